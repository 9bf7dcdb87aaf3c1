"""A model's matrix products where torch's own way is not the fastest.

In float32 torch multiplies by MKL, which has no kernels made for AMD's processors; oneDNN, which torch carries as well
and uses in bfloat16, has. It brings a weight into a layout of its own at every product, which costs as much as the
product itself where rows are few; where many follow each other, it is kept. Weights and gradients stay as they are, and
so do the bits.
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


MOST = 2 << 30
"""Bytes of a model's weights that are kept twice."""


@cache
def has_onednn() -> bool:
    """Whether torch multiplies by oneDNN when it is asked to."""
    names = "_linear_pointwise", "_reorder_linear_weight"
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


@cache
def onednn_is_faster() -> bool:
    """Whether this is a processor for which oneDNN is faster than what torch takes in float32."""
    if not (torch.backends.mkl.is_available() and has_onednn()):
        return False
    said = Path("/proc/cpuinfo")
    vendor = said.read_text(errors="replace") if said.exists() else platform.processor()
    return "AuthenticAMD" in vendor


@cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: on a GPU and a CPU made for it."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # of which torch tells
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def linears(model: nn.Module) -> list[nn.Linear]:
    """A model's linear maps that oneDNN multiplies as fast as any: plain ones on a CPU made for their precision."""
    dtypes = [torch.float32] if onednn_is_faster() else []
    if has_onednn() and fast_bfloat16(torch.device("cpu")):
        dtypes.append(torch.bfloat16)
    found = [module for module in model.modules() if type(module) is nn.Linear and module.weight.dtype in dtypes]
    return [module for module in found if _is_plain(module.weight) and min(module.weight.shape) >= FEATURES]


class Products:
    """How some linear maps are multiplied by.

    Args:
        modules: the maps, of `linears`.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self.modules, self._keeping = modules, 0
        self._kept: dict[int, tuple[tuple[int, int], Tensor]] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the weights in oneDNN's layout inside the block, once each has been used; it takes as much memory as
        they do. Where that is too much, nothing is kept. A weight that is changed through `.data` inside is not seen.
        """
        if sum(module.weight.nbytes for module in self.modules) > MOST:
            yield
            return
        self._keeping += 1
        try:
            yield
        finally:
            self._keeping -= 1
            if not self._keeping:
                self._kept.clear()

    @contextmanager
    def fast(self) -> Iterator[None]:
        """Let the maps multiply by oneDNN, where no gradient is asked for and no other precision than their own."""
        if not self.modules or not _allowed():
            yield
            return
        own = {id(one): partial(self._product, one) for one in self.modules if "forward" not in vars(one)}
        for module in self.modules:
            if id(module) in own:  # others have a way of somebody's
                vars(module)["forward"] = own[id(module)]
        try:
            yield
        finally:
            for module in self.modules:
                if vars(module).get("forward") is own.get(id(module), module):
                    del vars(module)["forward"]

    def _product(self, module: nn.Linear, x: Float[Tensor, "... k"]) -> Float[Tensor, "... n"]:
        weight, bias = module.weight, module.bias
        if x.dtype != weight.dtype or not _is_plain(weight) or not _allowed():
            return nn.functional.linear(x, weight, bias)
        exact = weight.dtype == torch.float32
        packed = None if exact and x.shape[:-1].numel() == 1 else self._packed(module)  # a single row has other bits
        if packed is None and not exact:
            return nn.functional.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, weight if packed is None else packed, bias, "none", [], "")

    def _packed(self, module: nn.Linear) -> Tensor | None:
        if not self._keeping or module.weight.is_inference():  # of which nobody knows whether they were changed
            return None
        now = module.weight.data_ptr(), module.weight._version  # somebody may change it between two products
        kept = self._kept.get(id(module))
        if kept is None or kept[0] != now:
            kept = now, torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), None)
            self._kept[id(module)] = kept
        return kept[1]


def _is_plain(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.device.type == "cpu"


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
