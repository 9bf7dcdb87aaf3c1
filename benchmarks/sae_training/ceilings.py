"""A TopK step on an accelerator against what the device can do: operations per second and bytes per second.

The ceilings are measured on the device itself, on a large product and a large copy. A step's least operations and bytes
follow from its sizes: the encoder's product for all features and four products for k of them; for each row its values
and four times k rows of weights or gradients; and per step every weight read once by the product and, with its gradient
and two moments, read and written once by Adam.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

PRODUCT = 8192
COPY_BYTES = 2**30
FLOAT = 4


def against_ceilings(rate: float, device: str, *, d: int, n: int, k: int, batch: int) -> dict[str, object]:
    """Rows per second that each ceiling allows, and what share of it `rate` is."""
    most = _ceilings(device)
    operations = 2 * d * n + 4 * 2 * d * k
    moved = FLOAT * d * (1 + 4 * k) + 9 * FLOAT * 2 * n * d / batch
    allowed = {
        "operations": most["float32"] / operations,
        "bfloat16_operations": most["bfloat16"] / operations,
        "bytes": most["bytes"] / moved,
    }
    return {
        **{f"accelerator.of_{name}": round(rate / value, 3) for name, value in allowed.items()},
        "accelerator.ceilings": {"per_second": most, "rows_per_second": allowed},
    }


def _ceilings(device: str) -> dict[str, float]:
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x = torch.randn(PRODUCT, PRODUCT, device=device, dtype=dtype)
        out = torch.empty_like(x)
        found[name] = 2 * PRODUCT**3 / _seconds(lambda x=x, out=out: torch.mm(x, x, out=out))
    source = torch.empty(COPY_BYTES // FLOAT, device=device)
    target = torch.empty_like(source)
    found["bytes"] = 2 * COPY_BYTES / _seconds(lambda: target.copy_(source))
    return found


def _seconds(work: Callable[[], object], repeats: int = 10) -> float:
    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats
