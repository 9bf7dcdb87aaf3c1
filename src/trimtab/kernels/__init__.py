"""Work of an accelerator that torch does in more passes over its memory than it takes: kernels in Triton.

Whoever has such work asks here first (`kernel_for`) and does it by torch's own operations where there is no kernel.
Nothing of Triton is imported before a tensor on a CUDA device is met. Torch's CUDA wheels bring Triton along.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

DEVICES = {"cuda"}
"""Where kernels run. Tests add the CPU, where Triton's interpreter runs them."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels read; they add up in float32."""
WIDEST = 32_768
"""Columns of a row that a kernel holds at once in its registers."""
KERNELS = {
    "weighted_bags": "bags",
    "bag_dots": "bags",
    "largest_in_rows": "largest",
    "keep_largest_in_rows": "largest",
    "remove_along_rows": "unit_rows",
    "divide_rows_by_norm": "unit_rows",
    "nucleus_floor": "nucleus",
}
"""The module of each kernel. One that is taken out here is left to torch."""


def kernel_for(name: str, *tensors: Tensor) -> Callable[..., Any] | None:
    """A kernel that takes these tensors; None where torch's operations must do it.

    They must off a CUDA device, in double precision, or where automatic differentiation has to see the operation.
    """
    if name not in KERNELS or not all(one.device.type in DEVICES and one.dtype in DTYPES for one in tensors):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    return _kernel(name)


def row_kernel_for(name: str, *tables: Tensor) -> Callable[..., Any] | None:
    """The same of a kernel that holds a whole row of each table at once, for which there must be room."""
    return kernel_for(name, *tables) if tables[0].shape[-1] <= WIDEST else None


@cache
def _kernel(name: str) -> Callable[..., Any] | None:
    return getattr(import_module(f"trimtab.kernels.{KERNELS[name]}"), name) if find_spec("triton") else None
