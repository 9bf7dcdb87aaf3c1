"""CUDA graphs on a CPU: what is captured is noted operation by operation, and done again without the Python around it.

As on a card: capturing changes no value; a replay reads and writes the tensors that were there when it was captured and
takes numbers of Python's, and tensors on the host, as they were then; whatever asks a tensor for its values cannot be
captured; and tensors that were made while capturing hold nothing of use once another graph of their pool is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from trimtab.lm.captured import Captured

ASKS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero", "bincount",
    "lift_fresh",
}  # fmt: skip
OF_SHAPE = {"squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_"}
"""What changes no number; the tape holds tensors in the shape that they had."""
REFUSED = "operation not permitted when stream is capturing"


class TapedGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self, pools: dict[Any, WeakSet[TapedGraph]], on_host: Callable[[Tensor], bool]) -> None:
        self.pools, self.on_host = pools, on_host
        self.tape: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: list[Tensor] = []
        """What is in the pool."""
        self.written: set[int] = set()
        """Addresses of tensors that were there before and that a replay changes."""
        self.replays = 0
        self._pool: Any = None

    def pool(self) -> Any:
        return self._pool

    def replay(self) -> None:
        self.replays += 1
        for graph in self.pools[self._pool]:
            for one in graph.made:
                one.fill_(_nothing_of_use(one))
        with torch.no_grad():
            for function, args, kwargs, found in self.tape:
                again = function(*args, **kwargs)
                for mine, new in zip(found, _tensors(again) if found else [], strict=True):
                    mine.copy_(new)


class _Taping(TorchDispatchMode):
    """What stands for `torch.cuda.graph`."""

    def __init__(self, graph: TapedGraph, *, pool: Any, stream: Any, capture_error_mode: str) -> None:
        super().__init__()
        assert stream is not None
        assert capture_error_mode == "thread_local"
        self.graph, graph._pool = graph, pool
        self.before: list[tuple[Tensor, Tensor]] = []
        self.hosts: dict[int, Tensor] = {}
        self.storages: set[int] = set()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        with torch.no_grad():
            for mine, value in reversed(self.before):
                mine.copy_(value)
        if kind is None:
            self.graph.pools.setdefault(self.graph._pool, WeakSet()).add(self.graph)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        if given and all(self._is_host(one) for one in given):
            found = func(*args, **kwargs)
            self.hosts |= {id(one): one for one in _tensors(found)}
            return found
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            one.dtype == torch.bool for one in _tensors(args[1])
        )
        if name in ASKS or by_mask:
            raise RuntimeError(f"{REFUSED}: {func}")
        args, kwargs = tree_map(lambda one: self._baked(one), (args, kwargs))
        self._keep_what_is_written(func, args, kwargs)
        then_args, then_kwargs = tree_map(lambda one: one.detach() if isinstance(one, Tensor) else one, (args, kwargs))
        found = func(*args, **kwargs)
        storages = {one.untyped_storage().data_ptr() for one in given}
        made = [] if func._schema.is_mutable else _tensors(found)
        fresh = [one for one in made if one.untyped_storage().data_ptr() not in storages]
        if (func._schema.is_mutable and name not in OF_SHAPE) or fresh:  # others are views
            assert not fresh or len(fresh) == len(made)
            self.graph.tape.append((func, then_args, then_kwargs, [one.detach() for one in fresh]))
        self.graph.made += fresh
        self.storages |= {one.untyped_storage().data_ptr() for one in fresh}
        return found

    def _is_host(self, one: Tensor) -> bool:
        return id(one) in self.hosts or self.graph.on_host(one)

    def _baked(self, one: Any) -> Any:
        return one.clone() if isinstance(one, Tensor) and self._is_host(one) else one

    def _keep_what_is_written(self, func: Any, args: Any, kwargs: Any) -> None:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = kwargs.get(argument.name) if argument.kwarg_only or place >= len(args) else args[place]
            for one in _tensors(value):
                address = one.untyped_storage().data_ptr()
                if address not in self.storages:
                    self.before.append((one.detach(), one.detach().clone()))
                    self.graph.written.add(address)


def _nothing_of_use(one: Tensor) -> float:
    if one.is_floating_point():
        return math.nan
    return True if one.dtype == torch.bool else min(2**40, torch.iinfo(one.dtype).max)


def _tensors(nested: Any) -> list[Tensor]:
    return [one for one in tree_flatten(nested)[0] if isinstance(one, Tensor)]


def tape_graphs(patch: pytest.MonkeyPatch, on_host: Callable[[Tensor], bool] = lambda _: False) -> list[TapedGraph]:
    """Take the CPU for a card from now on; the graphs that are captured. `on_host` tells what would not be there."""
    graphs, pools = list[TapedGraph](), dict[Any, WeakSet[TapedGraph]]()

    def new_graph() -> TapedGraph:
        graphs.append(TapedGraph(pools, on_host))
        return graphs[-1]

    init = Captured.__init__

    def on_a_card(self: Captured, *args: Any) -> None:
        init(self, *args)
        self.captures = True

    patch.setattr(Captured, "__init__", on_a_card)
    patch.setattr(torch.cuda, "CUDAGraph", new_graph)
    patch.setattr(torch.cuda, "graph", _Taping)
    patch.setattr(torch.cuda, "graph_pool_handle", object)
    for name in ("device", "stream", "current_stream"):
        patch.setattr(torch.cuda, name, lambda *_: nullcontext())
    patch.setattr(torch.cuda, "Stream", lambda *_: object())
    return graphs
