"""The least probability within the nucleus of every row, in Triton; `lm.sampling` has the same in torch.

Import this module only where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from torch import Tensor

COLUMNS_AT_ONCE = 8192


def nucleus_floor(probs: Float[Tensor, "B V"], wanted: int, unit: float) -> Float[Tensor, "B 1"]:
    """The largest number that the entries from it up, in whole units, add up to `wanted` at least; 0 if none do.

    A program reads its row once for every bit, from the first time on out of the cache.

    Args:
        probs: float32, from 0 to 1.
        wanted: a sum, in units.
        unit: how many are 1; a power of 2, at most 2⁶².
    """
    probs, (rows, size) = probs.detach().contiguous(), probs.shape
    least = torch.empty(rows, 1, dtype=torch.int32, device=probs.device)
    if rows:
        columns = min(COLUMNS_AT_ONCE, triton.next_power_of_2(size))
        with torch.cuda.device_of(probs):
            launch: Any = _nucleus_floor[(rows,)]  # pyright: ignore[reportIndexIssue]
            launch(probs, least, wanted, size, UNIT=unit, COLUMNS=columns, num_warps=max(4, columns // 256))
    return least.view(torch.float32)


@triton.jit
def _nucleus_floor(probs, out, wanted, size, UNIT: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = probs + row * size
    least = tl.zeros((), tl.int32)
    step = tl.full((), 1 << 29, tl.int32)  # 1 has no higher bit
    while step > 0:
        total = tl.zeros((COLUMNS,), tl.int64)
        for first in range(0, size, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            p = tl.load(start + column, mask=column < size, other=0.0)
            taken = p.to(tl.int32, bitcast=True) >= least + step
            total += tl.where(taken, (p * UNIT).to(tl.int64), 0)
        least = tl.where(tl.sum(total) >= wanted, least + step, least)
        step = step >> 1
    tl.store(out + row, least)
