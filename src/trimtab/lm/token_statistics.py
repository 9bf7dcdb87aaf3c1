"""Next-token distributions: log-probabilities of chosen tokens, entropies, and divergences from others."""

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


def log_normalisers(logits: Float[Tensor, "B ... V"]) -> Float[Tensor, "B ..."]:
    """log Σ exp of each row, in float32 or better. Without gradients, in blocks that fit the CPU's cache."""
    if logits.requires_grad or logits.dtype == torch.float64:
        return (logits if logits.dtype == torch.float64 else logits.float()).logsumexp(-1)
    flat = logits.flatten(0, -2)
    top, log_mass = (torch.cat(part) for part in zip(*map(_scale, flat.split(rows_per_block(flat))), strict=True))
    return (top + log_mass).view(logits.shape[:-1])


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
        torch.add(top, log_mass, out=total[start : start + rows])
        dots = _weighted_sums(w, d)
        torch.sub(log_mass, dots / mass, out=entropy[start : start + rows])
    return logits.gather(1, ids[:, None])[:, 0].float() - total, entropy


def kl_divergence(
    p: Float[Tensor, "R V"], q: Float[Tensor, "U V"], which: Int[Tensor, " R"] | None = None
) -> Float[Tensor, " R"]:
    """KL(p ‖ q) of each row of p, in nats, in float32, never below 0.

    Both sides are normalised here and not by `log_softmax`, whose normaliser is off by 1e-5 for wide rows in float32.

    Args:
        p: logits.
        q: logits.
        which: the row of `q` that each row of `p` is compared with; by default its own, or the only one.
    """
    if which is None:  # which a GPU is not asked for
        assert len(q) in (1, len(p)), f"{len(p)} rows cannot be compared with {len(q)}"
        of = [*range(len(p))] if len(q) == len(p) else [0] * len(p)
    else:
        of = which.tolist()
    rows = rows_per_block(p)
    top, log_mass = (torch.cat(column) for column in zip(*map(_scale, q.split(rows)), strict=True))
    difference = p.new_empty(min(rows, len(p)), p.shape[1], dtype=torch.float32)
    weights, (dots, mass) = torch.empty_like(difference), difference.new_empty(2, len(p))
    for start in range(0, len(p), rows):
        block = slice(start, start + rows)
        part, other = p[block].float(), as_slice(of[block])
        d, w = difference[: len(part)], weights[: len(part)]
        torch.sub(part, part.amax(dim=-1, keepdim=True), out=d)
        torch.exp(d, out=w)
        torch.sum(w, dim=-1, out=mass[block])
        d -= q[other] - top[other]
        dots[block] = _weighted_sums(w, d)
    return (dots / mass + log_mass[as_slice(of), 0] - mass.log()).clamp_min_(0)


def _weighted_sums(w: Float[Tensor, "R V"], d: Float[Tensor, "R V"]) -> Float[Tensor, " R"]:
    """Σ w d of each row, where weights of 0 (of logits of −∞) add nothing, whatever d is; d may be changed.

    On the CPU the usual case is one pass, and whether it was enough is asked. Elsewhere asking would wait for all that
    the device has still to do, at every token, and a pass more costs less.
    """
    if w.device.type != "cpu":
        return torch.linalg.vecdot(w, d.masked_fill_(w == 0, 0))
    dots = torch.linalg.vecdot(w, d)
    return torch.linalg.vecdot(w, d.masked_fill_(w == 0, 0)) if bool(dots.isnan().any()) else dots


def _scale(logits: Float[Tensor, "R V"]) -> tuple[Float[Tensor, "R 1"], Float[Tensor, "R 1"]]:
    """The largest logit of each row, and the logarithm of the sum of all probabilities over the largest."""
    logits = logits.float()
    top = logits.amax(dim=-1, keepdim=True)
    return top, (logits - top).exp_().sum(dim=-1, keepdim=True).log_()


def as_slice(numbers: list[int]) -> slice | list[int]:
    """An index of rows that copies none where they are consecutive; where all are the same, it is of one."""
    first, count = numbers[0], len(numbers)
    if count == 1 or numbers == [first] * count:
        return slice(first, first + 1)
    return slice(first, first + count) if numbers == list(range(first, first + count)) else numbers
