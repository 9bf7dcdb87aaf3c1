"""The k largest entries of every row, as a list or in their places, in Triton.

A program holds a row in its registers, as integers that are in the order of the numbers, finds the k-th largest bit by
bit, and then reads the row once more, from the cache, to write what is kept. Of equal entries the first are kept, so
that results are the same every time; NaN counts as the largest, as for `torch.topk`, so that none is lost. Import this
module only where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor


def largest_in_rows(h: Float[Tensor, "B n"], k: int) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
    """The k largest entries of every row and their places, ascending by place.

    Args:
        h: of at most `WIDEST` columns.
        k: from 1 to n.
    """
    h, (rows, n) = h.detach().contiguous(), h.shape
    assert 1 <= k <= n, f"{k} of {n}"
    values = torch.empty(rows, k, dtype=h.dtype, device=h.device)
    places = torch.empty(rows, k, dtype=torch.long, device=h.device)
    if rows:
        with torch.cuda.device_of(h):
            launch: Any = _largest_in_rows[(rows,)]  # pyright: ignore[reportIndexIssue]
            launch(h, values, places, k, n, **_sizes(n))
    return values, places


def keep_largest_in_rows(h: Float[Tensor, "B n"], k: int) -> Float[Tensor, "B n"]:
    """Every row with the k largest entries where they are, those below 0 set to 0, and 0 for all others.

    It is written over h, which is read and written once, unless h is a view with gaps.
    """
    h, (rows, n) = h.detach().contiguous(), h.shape
    assert 1 <= k <= n, f"{k} of {n}"
    if rows:
        with torch.cuda.device_of(h):
            launch: Any = _keep_largest_in_rows[(rows,)]  # pyright: ignore[reportIndexIssue]
            launch(h, k, n, **_sizes(n))
    return h


def _sizes(n: int) -> dict[str, int]:
    """Of a program: threads with 32 entries of the row each, for which there is room among their registers."""
    width = triton.next_power_of_2(n)
    warps = min(32, max(4, width // 1024))
    return {"WIDTH": width, "COLUMNS": min(width, 4 * 32 * warps), "num_warps": warps}


@triton.jit(do_not_specialize=["k"])  # which may change from step to step
def _largest_in_rows(h, values, places, k, n, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    least, room = _least_kept(h + row * n, k, n, WIDTH)
    taken = row * k
    for first in range(0, n, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(h + row * n + column, mask=column < n, other=0.0)
        kept, room = _kept(_ordered(x, column < n), least, room)
        slot = taken + tl.cumsum(kept.to(tl.int32)) - 1
        tl.store(values + slot, x, mask=kept)
        tl.store(places + slot, column.to(tl.int64), mask=kept)
        taken += tl.sum(kept.to(tl.int32))


@triton.jit(do_not_specialize=["k"])  # which may change from step to step
def _keep_largest_in_rows(h, k, n, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    start = h + tl.program_id(0).to(tl.int64) * n
    least, room = _least_kept(start, k, n, WIDTH)
    for first in range(0, n, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(start + column, mask=column < n, other=0.0)
        kept, room = _kept(_ordered(x, column < n), least, room)
        tl.store(start + column, tl.where(kept & ~(x.to(tl.float32) < 0), x, 0.0), mask=column < n)  # NaN stays


@triton.jit
def _least_kept(start, k, n, WIDTH: tl.constexpr):
    """The key that those of a row's k largest entries reach, and how many of those equal to it are among them."""
    BITS: tl.constexpr = start.dtype.element_ty.primitive_bitwidth
    column = tl.arange(0, WIDTH)
    key = _ordered(tl.load(start + column, mask=column < n, other=0.0), column < n)
    enough = tl.sum((key >= 0).to(tl.int32))  # how many reach `least`
    least = tl.where(enough >= k, 0, -(2 ** (BITS - 1)))
    enough = tl.where(enough >= k, enough, n)
    step = tl.full((), 2 ** (BITS - 2), tl.int32)
    while (step > 0) & (enough != k):
        more = tl.sum((key >= least + step).to(tl.int32))
        least = tl.where(more >= k, least + step, least)
        enough = tl.where(more >= k, more, enough)
        step = step >> 1
    return least, k - tl.sum((key > least).to(tl.int32))


@triton.jit
def _kept(key, least, room):
    """Which of some entries are kept, the first of equal ones; and how many equal ones may still come."""
    equal = key == least
    kept = (key > least) | (equal & (tl.cumsum(equal.to(tl.int32)) <= room))
    return kept, room - tl.sum((kept & equal).to(tl.int32))


@triton.jit
def _ordered(x, within):
    """Signed integers of as many bits in the order of the numbers: NaN largest, −0 equal to 0, below all what is not
    within the row."""
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    if BITS == 32:
        bits = x.to(tl.int32, bitcast=True)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    key = tl.where(bits < 0, bits ^ (2 ** (BITS - 1) - 1), bits)
    number = x.to(tl.float32)
    key = tl.where(number == 0, 0, key)
    key = tl.where(number != number, 2 ** (BITS - 1) - 1, key)
    return tl.where(within, key, -(2 ** (BITS - 1)))
