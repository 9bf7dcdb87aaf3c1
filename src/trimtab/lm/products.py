"""Matrix products in float32 on processors for which torch's own choice is not the fastest.

Torch multiplies in float32 by MKL, which has no kernels made for AMD's processors; oneDNN, which torch carries as well
and uses in bfloat16, has. Weights, layouts and gradients stay as they are.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

FEATURES = 64
"""Rows and columns that a weight has at least: of smaller ones the call costs more than the product."""


@cache
def onednn_is_faster() -> bool:
    """Whether this is a processor for which oneDNN is faster than what torch takes."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    said = Path("/proc/cpuinfo")
    vendor = said.read_text(errors="replace") if said.exists() else platform.processor()
    return "AuthenticAMD" in vendor


def linears(model: nn.Module) -> list[nn.Linear]:
    """A model's linear maps that oneDNN multiplies faster: in float32, on the CPU, with nothing of anybody's around."""
    if not onednn_is_faster():
        return []
    plain = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    return [
        module
        for module in plain
        if type(module.weight) is nn.Parameter
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and min(module.weight.shape) >= FEATURES
    ]


@contextmanager
def fast_products(modules: Sequence[nn.Linear]) -> Iterator[None]:
    """Let these multiply by oneDNN, where no gradient is asked for and products are not in lower precision anyway."""
    if not modules or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        yield
        return
    for module in modules:
        vars(module)["forward"] = partial(_product, module)
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _product(module: nn.Linear, x: Float[Tensor, "... k"]) -> Float[Tensor, "... n"]:
    weight = module.weight
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return nn.functional.linear(x, weight, module.bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, module.bias, "none", [], "")
