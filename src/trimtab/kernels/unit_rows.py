"""Rows that keep norm 1: their gradients without what lies along them, and their norm, in Triton.

A program reads a row once, where torch's operations read the table two or three times. Sums are in float32. Import this
module only where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from torch import Tensor


def remove_along_rows(G: Float[Tensor, "n d"], W: Float[Tensor, "n d"]) -> None:
    """G[i] ← G[i] − (G[i]·W[i]) W[i] for every row i, in place.

    Args:
        G: of at most `WIDEST` columns.
        W: rows of norm 1.
    """
    n, d = G.shape
    if G.numel():
        with torch.cuda.device_of(W):
            launch: Any = _remove_along_rows[(n,)]  # pyright: ignore[reportIndexIssue]
            launch(G, *G.stride(), W, *W.stride(), d, WIDTH=triton.next_power_of_2(d))


def divide_rows_by_norm(W: Float[Tensor, "n d"]) -> None:
    """W[i] ← W[i] / ‖W[i]‖ for every row i, in place; a row of zeros stays.

    Args:
        W: of at most `WIDEST` columns.
    """
    n, d = W.shape
    if W.numel():
        with torch.cuda.device_of(W):
            launch: Any = _divide_rows_by_norm[(n,)]  # pyright: ignore[reportIndexIssue]
            launch(W, *W.stride(), d, torch.finfo(W.dtype).tiny, WIDTH=triton.next_power_of_2(d))


@triton.jit
def _remove_along_rows(G, G_row, G_column, W, W_row, W_column, d, WIDTH: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH).to(tl.int64)
    within = column < d
    place = G + row * G_row + column * G_column
    w = tl.load(W + row * W_row + column * W_column, mask=within, other=0.0).to(tl.float32)
    g = tl.load(place, mask=within, other=0.0).to(tl.float32)
    tl.store(place, (g - tl.sum(g * w) * w).to(G.dtype.element_ty), mask=within)


@triton.jit
def _divide_rows_by_norm(W, W_row, W_column, d, tiny, WIDTH: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH).to(tl.int64)
    within = column < d
    place = W + row * W_row + column * W_column
    w = tl.load(place, mask=within, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(w * w))
    norm = tl.where(norm < tiny, tiny, norm)  # NaN stays
    tl.store(place, (w / norm).to(W.dtype.element_ty), mask=within)
