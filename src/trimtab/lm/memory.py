"""What to say where the memory of a device does not hold what is decoded."""

from __future__ import annotations

import torch

from trimtab.errors import UserError
from trimtab.lm.model import LanguageModel

COPIES = 2
"""Of a cache, while rows are moved or it grows."""
LOGITS = 4
"""Tensors of all logits in float32 that choosing a token holds at once."""
SURE = 0.8
"""Share of what is free that is promised: layers need some room, too."""


def held_bytes(device: torch.device) -> int:
    """Bytes that tensors take on a GPU now; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def row_bytes(model: LanguageModel, tokens: int) -> int:
    """About what a row of so many tokens takes while it is decoded: keys, values, logits."""
    attention = [layer.attention for layer in model.layout.layers]
    widths = [model.d_model if one is None else one.n_kv_heads * one.head_dim for one in attention]
    return COPIES * tokens * 2 * sum(widths) * model.dtype.itemsize + LOGITS * 4 * model.vocab_size


def too_many_rows(model: LanguageModel, rows: int, tokens: int, held: int) -> UserError:
    """What to raise where rows do not fit: how many would.

    Args:
        model: the model.
        rows: decoded side by side.
        tokens: of the longest, prompt included.
        held: bytes that were held before, of `held_bytes`.
    """
    device = model.device
    what = f"{rows} row{'s' * (rows > 1)} of up to {tokens} tokens side by side"
    why = f"{device} has no room for decoding them"
    fit = rows // 2
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
        fit = min(fit, int(SURE * free) // row_bytes(model, tokens))
    if fit >= 1:
        return UserError(what, why, f"lower the batch size to {fit} (--batch-size {fit})")
    return UserError(what, why, "use shorter texts, a lower precision (--dtype bfloat16) or another device")
