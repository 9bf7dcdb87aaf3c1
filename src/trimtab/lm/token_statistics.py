"""Log-probabilities of chosen tokens and entropies of next-token distributions."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

CPU_BLOCK = 1 << 16
"""Values per thread that are reduced at a time on the CPU, so that they stay in its cache."""


def rows_per_block(logits: Float[Tensor, "B V"]) -> int:
    """Rows that are best reduced together: as many as fit the CPU's cache, all of them on other devices."""
    if logits.device.type != "cpu":
        return max(1, len(logits))
    return max(1, torch.get_num_threads() * CPU_BLOCK // logits.shape[1])


def token_statistics(
    logits: Float[Tensor, "B V"], ids: Int[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Log-probability of each row's token and entropy of its distribution, in nats, in float32: `([B], [B])`."""
    rows = min(rows_per_block(logits), len(logits))
    below = logits.new_empty(rows, logits.shape[1], dtype=torch.float32)
    weights = torch.empty_like(below)
    total, entropy = below.new_empty(len(logits)), below.new_empty(len(logits))
    for start in range(0, len(logits), max(rows, 1)):
        part = logits[start : start + rows].float()
        d, w = below[: len(part)], weights[: len(part)]
        top = part.amax(dim=-1)
        torch.sub(part, top[:, None], out=d)
        torch.exp(d, out=w)
        mass = w.sum(dim=-1)
        log_mass = mass.log()
        total[start : start + rows] = top + log_mass
        entropy[start : start + rows] = log_mass - torch.linalg.vecdot(w, d) / mass
    return logits.gather(1, ids[:, None])[:, 0].float() - total, entropy
