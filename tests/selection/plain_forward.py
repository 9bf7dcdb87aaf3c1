"""The slow reference of criteria: the model's own forward pass, one edit at a time, no cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.lm import LanguageModel


def next_token(model: LanguageModel, prefix: str, layer: int, delta: Tensor) -> Tensor:
    """p(next token) with one vector added after a layer at the last token, softmax in float64; differentiable."""

    def hook(_module: object, _args: object, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[0, -1] += delta
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.layout.layers[layer].module.register_forward_hook(hook)
    try:
        logits = model.hf(torch.tensor([model.encode_text(prefix)]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()
    return logits.double().softmax(-1)


@torch.no_grad()
def amplified(model: LanguageModel, prefix: str, layer: int, delta: Tensor) -> Tensor:
    """The same without gradients."""
    return next_token(model, prefix, layer, delta)
