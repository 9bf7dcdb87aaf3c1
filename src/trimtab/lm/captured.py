"""Work that is done again and again on tensors at fixed addresses, replayed by a GPU as one graph."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.lm.precision import ProductPrecision, product_precision
from trimtab.lm.upper_layers import allowed_difference

WARM = 2
"""Calls that are taken as they are before one is captured."""
IDLE = "transformers.utils.output_capturing"
"""Where hooks are from that stay on a model whose hidden states were asked for once."""
Proof = Callable[[Callable[[], Tensor | None]], bool]
"""Given what replays a graph, whether that does what it was captured of."""


class Captured:
    """Calls of one function, of which those after the first few are replayed as one graph where there is a GPU.

    The function reads and writes tensors at fixed addresses and asks the device for no number. It is given with each
    call, so that nothing here holds what it belongs to. A graph is tried beside a call before it is used. Where there
    is none, or it gives something else, which is said once, and on other devices, the function is called each time.

    Args:
        device: where its tensors are.
        what: is being done, for the note.
    """

    def __init__(self, device: torch.device, what: str) -> None:
        self.device, self.what = device, what
        self.captures = device.type == "cuda"
        self._calls = 0
        self._graph: Any = None
        self._found: Tensor | None = None

    def may_replay(self, hf: nn.Module) -> bool:
        """Whether calls can do without the model's Python at the moment: False while somebody has a hook on it, which a
        graph would leave out. To be asked before hooks of one's own are there."""
        return self.captures and not is_watched(hf)

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph to replay."""
        return self._graph is not None

    def __call__(
        self, function: Callable[[], Tensor | None], *, replay: bool, proven: Proof | None = None
    ) -> Tensor | None:
        """What the function gives, which stays as it is whatever is called afterwards.

        Args:
            function: the same work at each call.
            replay: whether this call may be captured or replayed; see `may_replay`.
            proven: of a function that changes what it reads, tells whether what is given does the same, and leaves all
                as it was; by default what both give is compared.
        """
        if replay and self._graph is None and self.captures and self._calls >= WARM:
            self._capture(function)
            if self._graph is not None and not (proven or self._gives(function))(self._replayed):
                self._drop("its graph gives other numbers")
        self._calls += 1
        return function() if self._graph is None or not replay else self._replayed()

    def _gives(self, function: Callable[[], Tensor | None]) -> Proof:
        def proven(replayed: Callable[[], Tensor | None]) -> bool:
            found, expected = replayed(), function()
            assert found is not None
            assert expected is not None
            return are_near(found, expected, product_precision(expected.dtype, self.device))

        return proven

    def _replayed(self) -> Tensor | None:
        self._graph.replay()
        return None if self._found is None else self._found.clone()

    def _drop(self, why: str) -> None:
        self.captures, self._graph, self._found = False, None, None
        say_once(f"{self.what} is not captured as a graph, which is slower: {why}")

    def _capture(self, function: Callable[[], Tensor | None]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
                stream = torch.cuda.Stream(self.device)
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    found = function()
        except RuntimeError as error:  # it asked the host for a number, or the graph has no room
            _end_capture(graph, self.device)
            self._drop((str(error).strip().splitlines() or [""])[0])
        else:
            self._graph, self._found = graph, found


@cache  # of a command that does it for many prompts, once
def say_once(note: str) -> None:
    """Print a note on stderr, once in a process."""
    print(f"trimtab: note: {note}", file=sys.stderr, flush=True)


def _end_capture(graph: Any, device: torch.device) -> None:
    """Let torch's allocator forget a capture that failed; it would keep what is freed for the rest of the process."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    with suppress(Exception):  # where it has forgotten it by itself
        if end is not None:
            end(torch.cuda.current_device() if device.index is None else device.index, graph.pool())


def are_near(found: Tensor, expected: Tensor, precision: ProductPrecision) -> bool:
    """Whether whole numbers and truths are equal, and others but for what rounding in a precision may make of them."""
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return False
    mine, other = (torch.where(expected.isfinite(), x, 0).double() for x in (found, expected))
    return float((mine - other).norm()) <= allowed_difference(precision) * float(other.norm())


def is_watched(hf: nn.Module) -> bool:
    """Whether somebody has a hook on a model. Those that `transformers` leaves behind do nothing."""
    hooks = (
        hook
        for module in hf.modules()
        for held in (module._forward_hooks, module._forward_pre_hooks)
        for hook in held.values()
    )
    return any(getattr(hook, "__module__", "") != IDLE for hook in hooks)
