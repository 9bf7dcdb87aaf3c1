"""One step of a finetuning: its forward pass and loss, with what must stay in place until its gradients are there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.flags.examples import LabelledBatch
from trimtab.flags.loss import FlagReading, forcing, response_loss
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel


class StepLoss(NamedTuple):
    """What one step gives."""

    total: Tensor
    cross_entropy: Tensor
    flag_loss: Tensor | None
    """None where flags were forced."""
    reading: FlagReading | None


@contextmanager
def step_loss(
    model: LanguageModel,
    flags: FlagSpec,
    batch: LabelledBatch,
    *,
    forced: bool,
    weight: float,
    form: str,
    tokens: int | None = None,
    autocast: bool = False,
) -> Iterator[StepLoss]:
    """The loss of a step: the mean cross-entropy of the responses' tokens, plus λ · the flags' loss unless forced.

    Take the gradients inside the block: where layers are computed again for them, flags must be written there, too.

    Args:
        model: the model.
        flags: its flags.
        batch: examples.
        forced: write the right values into the flags everywhere.
        weight: λ; at 0 flags are read without gradients.
        form: of the flags' loss.
        tokens: of responses, by which sums are divided; those of the batch by default, those of all processes where
            the batch is one of several.
        autocast: compute matrix products in bfloat16.
    """
    n = int(batch.answer.sum()) if tokens is None else tokens
    products = torch.autocast(model.device.type, torch.bfloat16, enabled=autocast)
    if forced:
        with forcing(model, flags, batch.labels):
            with products:
                loss = response_loss(model, batch).sum() / n
            yield StepLoss(loss, loss, None, None)
        return
    reading = FlagReading(flags, batch, form, gradients=weight > 0)
    with reading.reading(model):
        with products:
            loss = response_loss(model, batch).sum() / n
        flag_loss = reading.loss_sum / n
        yield StepLoss(loss + weight * flag_loss if weight else loss, loss, flag_loss, reading)


@contextmanager
def recomputed_layers(model: LanguageModel) -> Iterator[None]:
    """Gradient checkpointing inside the block: what layers compute is not kept for the gradients but computed again.

    `transformers` does it in layers that are in training mode; these alone are, so that dropout stays off.

    Raises:
        UserError: the model's layers cannot do it.
    """
    hf = model.hf
    layers = [layer.module for layer in model.layout.layers]
    if not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        why = f"{type(layers[0]).__name__} has no gradient checkpointing"
        raise UserError(f"gradient checkpointing of {model.name}", why, "leave it out")
    _switch_recomputing(hf, on=True)
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        _switch_recomputing(hf, on=False)


def _switch_recomputing(hf: Any, *, on: bool) -> None:
    """By the name of the method that this version of `transformers` has."""
    word = "activation" if hasattr(hf, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(hf, f"{word}_checkpointing_enable")({"use_reentrant": False})
        return
    getattr(hf, f"{word}_checkpointing_disable")()
    if hasattr(hf, "_require_grads_hook"):  # on the embeddings, which that method leaves
        hf.disable_input_require_grads()
