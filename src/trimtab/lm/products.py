"""A model's matrix products where torch's own way is not the fastest.

In float32 torch multiplies by MKL, which has no kernels made for AMD's processors; oneDNN, which torch carries as well
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
"""Rows and columns that a weight has at least: the products of smaller ones cost less than the call."""


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
    """A model's linear maps that oneDNN multiplies faster: plain ones in float32 on the CPU."""
    if not onednn_is_faster():
        return []
    found = [module for module in model.modules() if type(module) is nn.Linear]
    return [module for module in found if _is_plain(module.weight) and min(module.weight.shape) >= FEATURES]


@contextmanager
def fast_products(modules: Sequence[nn.Linear]) -> Iterator[None]:
    """Let these multiply by oneDNN, where no gradient is asked for and products are not in lower precision anyway."""
    if not modules or not _allowed():
        yield
        return
    own = {id(module): partial(_product, module) for module in modules if "forward" not in vars(module)}
    for module in modules:
        if id(module) in own:  # others have a way of somebody's
            vars(module)["forward"] = own[id(module)]
    try:
        yield
    finally:
        for module in modules:
            if vars(module).get("forward") is own.get(id(module), module):
                del vars(module)["forward"]


def _product(module: nn.Linear, x: Float[Tensor, "... k"]) -> Float[Tensor, "... n"]:
    weight = module.weight
    if x.dtype != torch.float32 or not _is_plain(weight) or not _allowed():
        return nn.functional.linear(x, weight, module.bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, module.bias, "none", [], "")


def _is_plain(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"


def _allowed() -> bool:
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@contextmanager
def contiguous_rows(head: nn.Module | None) -> Iterator[None]:
    """Let the output embedding read rows that lie behind each other in memory. The last positions of longer rows do
    not, and torch then multiplies row by row, in bfloat16 on a CPU with a copy of the whole table for each."""
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))
    try:
        yield
    finally:
        hook.remove()
