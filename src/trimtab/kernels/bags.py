"""Weighted sums of rows, and dot products with rows, for bags of pairs: the two products of sparse codes, in Triton.

A bag is a run of pairs: those of one row of a batch, or those of one feature. Pairs are added up in their order, in
float32, so that results are the same every time. Import this module only where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

PAIRS_AT_ONCE = 16
COLUMNS_AT_ONCE = 128


def weighted_bags(
    index: Int[Tensor, " m"], weight: Float[Tensor, " m"], start: Int[Tensor, " bags_and_end"], W: Float[Tensor, "n d"]
) -> Float[Tensor, "bags d"]:
    """Row b is Σ weight[p]·W[index[p]] over the pairs p of bag b; an empty bag gives zeros.

    Args:
        index: row of W that each pair refers to, bag after bag.
        weight: one per pair.
        start: where each bag begins; the last entry is m.
        W: float32, bfloat16 or float16; so is the result.
    """
    index, weight, start, W = (t.detach().contiguous() for t in (index, weight, start, W))
    bags, d = start.shape[0] - 1, W.shape[1]
    out = torch.empty(bags, d, dtype=W.dtype, device=W.device)
    if out.numel():
        columns = _columns(d)
        grid = (bags, triton.cdiv(d, columns))
        with torch.cuda.device_of(W):
            launch: Any = _weighted_bags[grid]  # pyright: ignore[reportIndexIssue]
            launch(index, weight, start, W, out, d, PAIRS=PAIRS_AT_ONCE, COLUMNS=columns)
    return out


def bag_dots(
    index: Int[Tensor, " m"], start: Int[Tensor, " bags_and_end"], X: Float[Tensor, "bags d"], W: Float[Tensor, "n d"]
) -> Float[Tensor, " m"]:
    """X[b]·W[index[p]] for every pair p of every bag b, in the dtype of X."""
    index, start, X, W = (t.detach().contiguous() for t in (index, start, X, W))
    bags, d = X.shape
    out = torch.empty(index.shape[0], dtype=X.dtype, device=X.device)
    if bags and out.numel():
        with torch.cuda.device_of(W):
            launch: Any = _bag_dots[(bags,)]  # pyright: ignore[reportIndexIssue]
            launch(index, start, X, W, out, d, PAIRS=PAIRS_AT_ONCE, COLUMNS=_columns(d))
    return out


def _columns(d: int) -> int:
    return min(COLUMNS_AT_ONCE, triton.next_power_of_2(d))


@triton.jit
def _weighted_bags(index, weight, start, W, out, d, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < d
    end = tl.load(start + bag + 1)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(tl.load(start + bag), end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        present = pair < end
        row = tl.load(index + pair, mask=present, other=0)
        factor = tl.load(weight + pair, mask=present, other=0.0).to(tl.float32)
        rows = tl.load(W + row[:, None] * d + column[None, :], mask=present[:, None] & within[None, :], other=0.0)
        total += tl.sum(factor[:, None] * rows.to(tl.float32), axis=0)
    tl.store(out + bag * d + column, total.to(out.dtype.element_ty), mask=within)


@triton.jit
def _bag_dots(index, start, X, W, out, d, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    end = tl.load(start + bag + 1)
    for first in range(tl.load(start + bag), end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        present = pair < end
        row = tl.load(index + pair, mask=present, other=0)
        dot = tl.zeros((PAIRS,), dtype=tl.float32)
        for begin in range(0, d, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            within = column < d
            x = tl.load(X + bag * d + column, mask=within, other=0.0).to(tl.float32)
            rows = tl.load(W + row[:, None] * d + column[None, :], mask=present[:, None] & within[None, :], other=0.0)
            dot += tl.sum(rows.to(tl.float32) * x[None, :], axis=1)
        tl.store(out + pair, dot.to(out.dtype.element_ty), mask=present)
