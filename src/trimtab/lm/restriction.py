"""Choosing the next token among a few given ones, such as the letters of a question's options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.lm.sampling import choose_token


def pack_allowed(rows: Sequence[Sequence[int]], device: torch.device | str) -> Int[Tensor, "B A"]:
    """Each row's tokens, ascending; shorter rows are filled with their last one, whose copies are never chosen."""
    ordered = [sorted(set(row)) for row in rows]
    width = max(map(len, ordered))
    return torch.tensor([row + [row[-1]] * (width - len(row)) for row in ordered], device=device)


def choose_allowed(
    allowed: Int[Tensor, "B A"],
    logits: Float[Tensor, "B V"],
    temperature: float,
    top_p: float,
    u: Float[Tensor, " B"] | None,
) -> Int[Tensor, " B"]:
    """`choose_token` over each row's allowed tokens, every other logit taken as −∞. Ties go to the smaller id."""
    copies = torch.zeros_like(allowed, dtype=torch.bool)
    copies[:, 1:] = allowed[:, 1:] == allowed[:, :-1]
    kept = logits.gather(1, allowed).masked_fill(copies, -torch.inf)
    return allowed.gather(1, choose_token(kept, temperature, top_p, u)[:, None])[:, 0]
