"""Attention of single tokens in lower precision on a CPU, where torch's kernel is made for many queries.

A decode step has one query for each row and head. Torch gives each its own turn; here all heads that share keys and
values are one product, in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

IMPLEMENTATION = "sdpa"
"""The only one of transformers' attention functions that is replaced."""
_lock, _inside, _own = threading.Lock(), 0, []


@contextmanager
def fast_attention(hf: transformers.PreTrainedModel) -> Iterator[None]:
    """Single tokens of a model attend faster inside the block, where that is done; what else runs is as it was."""
    low = hf.dtype in (torch.bfloat16, torch.float16) and hf.device.type == "cpu" and not torch.is_grad_enabled()
    if not low or hf.config.get_text_config()._attn_implementation != IMPLEMENTATION:
        yield
        return
    from transformers.modeling_utils import AttentionInterface  # loads model classes, which help has no need of

    mapping: dict[str, Any] = AttentionInterface._global_mapping
    global _inside
    with _lock:  # several threads may be here at once
        _inside += 1
        if _inside == 1:
            _own.append(mapping[IMPLEMENTATION])
            mapping[IMPLEMENTATION] = partial(_attend, mapping[IMPLEMENTATION])
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                mapping[IMPLEMENTATION] = _own.pop()


def _attend(
    own: Callable[..., Any], module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    *args: Any, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What `own` gives, for one query of each row and head by itself."""
    known = not args and all(not kwargs.get(name) for name in ("dropout", "softcap", "output_attentions"))
    known = known and kwargs.get("position_bias") is None and q.dtype in (torch.bfloat16, torch.float16)
    shared = mask is None or (mask.ndim == 4 and mask.shape[1:3] == (1, 1) and mask.shape[-1] == k.shape[2])
    if not known or not shared or q.shape[2] != 1 or q.device.type != "cpu" or q.shape[1] % k.shape[1]:
        return own(module, q, k, v, mask, *args, **kwargs)
    scaling = kwargs.get("scaling")
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = q[:, :, 0].float().unflatten(1, (k.shape[1], -1)) * scale  # [B, kv_heads, group, d]
    scores = grouped @ k.float().transpose(2, 3)
    if mask is not None:
        low = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask.float()
    found = scores.softmax(-1) @ v.float()
    return found.flatten(1, 2)[:, None].to(q.dtype), None
