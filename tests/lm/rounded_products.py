"""Float32 products whose factors are rounded, as TF32 and bfloat16 products round them, on any CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BITS = {"tf32": 10, "bf16": 7}
"""Of the fraction that are kept."""
FEW = 4
"""Products of up to so many rows are exact: those of few rows have other kernels on a card, and other bits."""


class RoundedProducts(TorchDispatchMode):
    """Rounds the factors of every float32 product inside the block, and of attention's.

    Args:
        name: `tf32` or `bf16`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.drop = 23 - BITS[name]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        first = {"mm": 0, "bmm": 0, "linear": 0, "_linear_pointwise": 0, "addmm": 1, "baddbmm": 1}.get(name)
        count = 2
        if "attention" in name:
            first, count = 0, 3
        if first is not None and args[first].shape[:-1].numel() > FEW:
            factors = [self._rounded(x) for x in args[first : first + count]]
            args = (*args[:first], *factors, *args[first + count :])
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.layout != torch.strided:
            return x
        bits = x.contiguous().view(torch.int32)
        return (bits + (1 << (self.drop - 1)) & -(1 << self.drop)).view(torch.float32)
