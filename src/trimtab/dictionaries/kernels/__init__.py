"""The products of sparse codes as kernels of an accelerator, for `dictionaries.sparse`, which asks here first.

Nothing of Triton is imported before a tensor on a CUDA device is met. Torch's CUDA wheels bring Triton along; without
it torch's own operations do the work.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read; they add up in float32."""


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """The module `bags`, if its kernels can take these tensors; None where torch's operations must.

    They cannot off a CUDA device, in double precision, or where automatic differentiation has to see the operation.
    """
    if not all(tensor.device.type == "cuda" and tensor.dtype in DTYPES for tensor in tensors):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    return _bags()


@cache
def _bags() -> ModuleType | None:
    return import_module("trimtab.dictionaries.kernels.bags") if find_spec("triton") else None
