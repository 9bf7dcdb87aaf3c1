"""Draws that depend on nothing but their key, and the choice of a token by inverse CDF, among all or a few given ones.

A draw is one uniform keyed by (seed, sample, branch, position, stream), so that a row gives the same
tokens and actions whatever else is in its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.kernels import kernel_for
from trimtab.lm.token_statistics import rows_per_block

TOKEN_STREAM = 0
ACTION_STREAM = 1
FIRST = 256
"""Tokens that a nucleus is looked for in first."""
UNIT = 2.0**62
"""A probability of 1 in the whole units in which `nucleus_floor` adds up."""

# SplitMix64 (Steele, Lea & Flood 2014), in two's complement because torch has no unsigned 64-bit arithmetic.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def uniform(
    seed: Int[Tensor, " B"] | int,
    sample: Int[Tensor, " B"],
    branch: Int[Tensor, " B"] | int,
    position: Int[Tensor, " B"] | int,
    stream: int = TOKEN_STREAM,
) -> Float[Tensor, " B"]:
    """Uniform draws in [0, 1), float64, one per row, each a hash of its key alone.

    Args:
        seed: of the run.
        sample: which sample of the run a row belongs to.
        branch: which fork of the sample.
        position: absolute position of the input token.
        stream: what the draw is for: `TOKEN_STREAM`, `ACTION_STREAM`, or any other integer.
    """
    state = torch.zeros_like(sample, dtype=torch.int64) + seed
    for part in (sample, branch, position, stream):
        state = _mix(state + _GOLDEN) ^ part
    return _shift_right(_mix(state + _GOLDEN), 11).double() / float(1 << 53)


def inverse_cdf(weights: Float[Tensor, "B V"], u: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Index i with CDF(i−1) ≤ u < CDF(i), for non-negative weights of any sum, in index order."""
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    whole = cdf[:, -1:].contiguous()
    index = torch.searchsorted(cdf, u[:, None] * whole, right=True)[:, 0]
    # u close to 1 can round up to the whole sum: take the first index that reaches it, which has a weight.
    index = torch.minimum(index, torch.searchsorted(cdf, whole)[:, 0])
    return index.clamp_max_(weights.shape[-1] - 1)  # of weights that are not finite: whoever draws says so


def choose_token(
    logits: Float[Tensor, "B V"],
    temperature: float,
    top_p: float,
    u: Float[Tensor, " B"] | None,
    first: int | None = FIRST,
) -> Int[Tensor, " B"]:
    """The next token of each row: the largest logit at temperature 0, an inverse-CDF draw otherwise.

    Args:
        logits: unscaled.
        temperature: 0 for greedy decoding.
        top_p: keep the smallest set of most likely tokens whose probabilities reach this sum (1 keeps all).
        u: uniform draws; not needed at temperature 0.
        first: see `nucleus`; None finds it without asking the device for anything, by `nucleus_floor`.
    """
    if temperature == 0:  # the first of the largest
        if logits.device.type == "cpu" and logits.dtype == torch.float32:
            return torch.from_numpy(logits.detach().numpy().argmax(axis=-1))  # faster than torch's
        return logits.argmax(dim=-1)
    assert u is not None
    rows = rows_per_block(logits)
    parts = zip(logits.split(rows), u.split(rows), strict=True)
    return torch.cat([_drawn(part, temperature, top_p, of_part, first) for part, of_part in parts])


def _drawn(
    logits: Float[Tensor, "B V"], temperature: float, top_p: float, u: Float[Tensor, " B"], first: int | None
) -> Int[Tensor, " B"]:
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p == 1:
        return inverse_cdf(probs, u)
    if first is None:
        return inverse_cdf(probs.masked_fill_(probs < nucleus_floor(probs, top_p), 0.0), u)
    tokens, weights = nucleus(probs, top_p, first)
    return tokens.gather(1, inverse_cdf(weights, u)[:, None])[:, 0]


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
    first: int | None = FIRST,
) -> Int[Tensor, " B"]:
    """`choose_token` over each row's allowed tokens, every other logit taken as −∞. Ties go to the smaller id."""
    copies = torch.zeros_like(allowed, dtype=torch.bool)
    copies[:, 1:] = allowed[:, 1:] == allowed[:, :-1]
    kept = logits.gather(1, allowed).masked_fill(copies, -torch.inf)
    return allowed.gather(1, choose_token(kept, temperature, top_p, u, first)[:, None])[:, 0]


def nucleus(
    probs: Float[Tensor, "B V"], top_p: float, first: int = FIRST
) -> tuple[Int[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Each row's smallest set of most likely tokens that hold `top_p`, and those that tie with its last one.

    Sorting the whole vocabulary costs more than the model on a CPU; the nucleus is almost always within the first
    few hundred tokens, so those are tried first, and more of them where they do not hold all of it.

    Returns:
        Tokens in the order of their ids, and their probabilities; of tokens outside, which fill rows up, 0.
    """
    size = min(first, probs.shape[-1])
    values, tokens = probs.topk(size, dim=-1)
    crossing = (values.cumsum(dim=-1, dtype=torch.float64) < top_p).sum(dim=-1, keepdim=True).clamp_max(size - 1)
    least = values.gather(1, crossing)
    if size < probs.shape[-1] and bool((values[:, -1:] >= least).any()):
        return nucleus(probs, top_p, first * 8)
    tokens, order = tokens.sort(dim=-1)
    return tokens, torch.where(values >= least, values, 0).gather(1, order)


def nucleus_floor(probs: Float[Tensor, "B V"], top_p: float) -> Float[Tensor, "B 1"]:
    """The least probability within the `nucleus` of each row, found bit by bit; 0 where the whole row is not enough.

    Nothing is sorted, and nothing is asked of the device, so that a GPU can replay it as part of a graph. Probabilities
    are added up in whole units of 2⁻⁶², cut off there, so that the order makes no difference: from equal probabilities
    every device and kernel finds the same floor. `nucleus` adds up float64 in the order of size; both find the same
    tokens unless `top_p` is within rounding (V·2⁻⁵³) of what some of the most likely tokens hold.

    Args:
        probs: float32.
        top_p: the sum that the nucleus holds at least.
    """
    wanted = math.ceil(top_p * UNIT)
    if floor := kernel_for("nucleus_floor", probs):
        return floor(probs, wanted, UNIT)
    bits, mass = probs.view(torch.int32), (probs * UNIT).long()  # bits are in the order of numbers from 0 up
    least = torch.zeros_like(bits[:, :1])
    for place in reversed(range(30)):  # 1 has no higher bit
        tried = least + (1 << place)
        holds = torch.where(bits >= tried, mass, 0).sum(-1, keepdim=True) >= wanted
        least = torch.where(holds, tried, least)
    return least.view(torch.float32)
