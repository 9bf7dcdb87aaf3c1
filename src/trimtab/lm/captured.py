"""Work that is done again and again on tensors at fixed addresses, replayed by a GPU as one graph."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

WARM = 2
"""Calls that are taken as they are before one is captured."""


class Captured:
    """Calls of one function, of which those after the first few are replayed as one graph where there is a GPU.

    The function reads and writes tensors at fixed addresses and asks the device for no number. It is given with each
    call, so that nothing here holds what it belongs to. Where it cannot be captured, which is said once, and on other
    devices, it is called each time.

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

    def __call__(self, function: Callable[[], Tensor | None], *, replay: bool) -> Tensor | None:
        """What the function gives, which stays as it is whatever is called afterwards.

        Args:
            function: the same work at each call.
            replay: whether this call may be captured or replayed; see `may_replay`.
        """
        if replay and self._graph is None and self.captures and self._calls >= WARM:
            self._capture(function)
        self._calls += 1
        if self._graph is None or not replay:
            return function()
        self._graph.replay()
        return None if self._found is None else self._found.clone()

    def _capture(self, function: Callable[[], Tensor | None]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
                stream = torch.cuda.Stream(self.device)
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    found = function()
        except RuntimeError as error:  # it asked the host for a number, or the graph has no room
            self.captures = False
            lines = str(error).strip().splitlines() or [""]
            _say(f"{self.what} is not captured as a graph, which is slower: {lines[0]}")
        else:
            self._graph, self._found = graph, found


@cache  # of a command that does it for many prompts, once
def _say(note: str) -> None:
    print(f"trimtab: note: {note}", file=sys.stderr, flush=True)


def is_watched(hf: nn.Module) -> bool:
    """Whether somebody has a hook on a model."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
