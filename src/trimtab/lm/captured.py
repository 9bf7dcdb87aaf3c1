"""Work that is done again and again on tensors at fixed addresses, replayed by a GPU as one graph."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from trimtab.lm.precision import ProductPrecision, product_precision
from trimtab.lm.upper_layers import allowed_difference

WARM = 2
"""Calls that are taken as they are before one is captured."""
IDLE = "transformers.utils.output_capturing"
"""Where hooks are from that stay on a model whose hidden states were asked for once."""
CALLS_PER_CAPTURE = 100
"""Calls for each graph after the first, at least, so that graphs of what keeps changing cost little."""
MOST_KEPT = 4
"""Graphs of other keys that are kept."""
OF_CHANGE = 0.05
"""Share of what a call changes by which a graph's may differ from the function's: rounding, of which Adam's first steps
make much, since their size does not depend on the gradient's."""
OTHER_NUMBERS = "its graph gives other numbers"
NO_ROOM = "there is no room to try it"
PIECE = 2**22
"""Numbers that are compared at once, so that a comparison needs little memory."""
Proof = Callable[[Callable[[], Tensor | None]], bool]
"""Given what replays a graph, whether that does what it was captured of."""


class GraphPool:
    """Memory that all graphs of a device have in common: none reads there what it has not written in the same replay,
    and what it gives is copied before another is replayed. One for all, since torch keeps memory for products by the
    stream that graphs are captured on, which would outlive a pool of their own.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._users: WeakSet[Captured] = WeakSet()
        self._place: PoolPlace | None = None
        self._replaying = threading.Lock()
        self._last: torch.cuda.Stream | None = None

    def place(self, user: Captured) -> PoolPlace:
        """Where to capture another graph. A pool that no graph holds any more is gone, so that there is a new one."""
        if self._place is None or not any(one.holds_graphs for one in self._users):
            stream = self._place.stream if self._place else torch.cuda.Stream(self.device)
            self._place = PoolPlace(torch.cuda.graph_pool_handle(), stream)
        self._users.add(user)
        return self._place

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While one graph is replayed, no other is: not by another thread, nor on another stream."""
        with self._replaying:
            if self.device.type == "cuda":
                stream = torch.cuda.current_stream(self.device)
                if self._last is not None and self._last != stream:
                    stream.wait_stream(self._last)
                self._last = stream
            yield


class PoolPlace(NamedTuple):
    """Torch's name of a pool, and the stream that its graphs are captured on, which must be one for all."""

    handle: Any
    stream: Any


pool_on = cache(GraphPool)
"""The pool of a device."""


class Captured:
    """Calls of one function, of which those after the first few are replayed as one graph where there is a GPU.

    The function reads and writes tensors at fixed addresses and asks the device for no number. It is given with each
    call, so that nothing here holds what it belongs to. A graph is tried beside a call before it is used. Where there
    is none, or it gives something else, which is said once, and on other devices, the function is called each time.

    A graph repeats the tensors' work without Python. Where Python decides what that is, calls have a key, and each key
    has a graph of its own; few are kept.

    Args:
        device: where its tensors are.
        what: is being done, for the note.

    Attributes:
        replays: calls that were replayed.
    """

    def __init__(self, device: torch.device, what: str) -> None:
        self.device, self.what, self.pool = device, what, pool_on(device)
        self.captures = device.type == "cuda"
        self.replays = 0
        self._calls = self._all_calls = self._captured_times = 0
        self._settled = False
        self._key: Hashable = None
        self._graph: Any = None
        self._found: Tensor | None = None
        self._others: dict[Hashable, tuple[Any, Tensor | None]] = {}

    def may_replay(self, hf: nn.Module) -> bool:
        """Whether calls can do without the model's Python at the moment: False while somebody has a hook on it, which a
        graph would leave out. To be asked before hooks of one's own are there."""
        return self.captures and not is_watched(hf)

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph to replay."""
        return self._graph is not None

    @property
    def holds_graphs(self) -> bool:
        """Whether there is a graph for this key or another."""
        return self.is_captured or bool(self._others)

    @property
    def is_unsettled(self) -> bool:
        """Whether there were by now so many calls, and never enough of one key to capture one."""
        return self.captures and not self._settled and self._all_calls == CALLS_PER_CAPTURE

    def __call__(
        self,
        function: Callable[[], Tensor | None],
        *,
        replay: bool,
        key: Hashable = None,
        proven: Proof | None = None,
        changes: Callable[[], Sequence[Tensor]] | None = None,
    ) -> Tensor | None:
        """What the function gives, which stays as it is whatever is called afterwards.

        Args:
            function: the same work at each call of one key.
            replay: whether this call may be captured or replayed; see `may_replay`.
            key: what Python decides by within the function.
            proven: of a function that changes what it reads, tells whether what is given does the same, and leaves all
                as it was; by default what both give is compared.
            changes: instead, of a function that gives nothing, all tensors that it changes: the call by which a graph
                is tried is then made in both ways, from one state, of which there is a copy meanwhile.
        """
        self._turn_to(key)
        pays = self._all_calls >= CALLS_PER_CAPTURE * self._captured_times
        tries = replay and self._graph is None and self.captures and self._calls >= WARM and pays
        self._settled |= self._calls >= WARM
        self._calls += 1
        self._all_calls += 1
        self._captured_times += tries
        if tries and changes is not None:
            return self._made_in_both_ways(function, changes())
        if tries:
            self._capture(function)
            if self._graph is not None and not (proven or self._gives(function))(self._replayed):
                self.refuse(OTHER_NUMBERS)
        if self._graph is None or not replay:
            return function()
        self.replays += 1
        return self._replayed()

    def refuse(self, why: str) -> None:
        """Replay nothing from now on, and say why."""
        self.captures, self._graph, self._found = False, None, None
        self._others.clear()
        say_once(f"{self.what} is not captured as a graph, which is slower: {why}")

    def _turn_to(self, key: Hashable) -> None:
        """Take up the graph of a key, if there is one, and put that of another aside."""
        if key == self._key:
            return
        if self._graph is not None:
            self._others[self._key] = self._graph, self._found
        self._graph, self._found = self._others.pop(key, (None, None))
        for oldest in [*self._others][:-MOST_KEPT]:
            del self._others[oldest]
        self._key, self._calls = key, 0

    def _made_in_both_ways(self, function: Callable[[], Tensor | None], state: Sequence[Tensor]) -> None:
        """Make a call, and once more by a new graph from the same state, which counts if it did the same.

        The function comes first, so that its memory is free again when the graph takes its own, and nothing is to be
        undone where there is no room for one.
        """
        before, aside, fits = list[Tensor](), torch.empty(0), True
        try:
            before += [one.clone() for one in state]
            aside = torch.empty(
                max(_bytes_of(mine) for one in state for mine, _ in _pieces(one, one)),
                dtype=torch.uint8,
                device=self.device,
            )
            function()
        except torch.OutOfMemoryError:
            fits = False
        if not fits:  # maybe for want of what the copy takes
            for mine, one in zip(state, before, strict=len(before) == len(state)):
                mine.copy_(one)
            before.clear()
            self.refuse(NO_ROOM)
            function()
            return
        self._capture(function)
        if self._graph is None:
            return
        try:
            changes = [_distance(mine, one) for mine, one in zip(state, before, strict=True)]
        except torch.OutOfMemoryError:
            return self.refuse(NO_ROOM)
        after = before  # from the exchange on: what the function left
        for mine, one in zip(state, before, strict=True):
            _swap(mine, one, aside)
        why = OTHER_NUMBERS
        try:
            self._replayed()
            is_alike = all(_changed_alike(*three) for three in zip(state, after, changes, strict=True))
        except torch.OutOfMemoryError:
            is_alike, why = False, NO_ROOM
        if is_alike:
            self.replays += 1
            return None
        for mine, one in zip(state, after, strict=True):
            mine.copy_(one)
        self.refuse(why)
        return None

    def _gives(self, function: Callable[[], Tensor | None]) -> Proof:
        def proven(replayed: Callable[[], Tensor | None]) -> bool:
            found, expected = replayed(), function()
            assert found is not None
            assert expected is not None
            return are_near(found, expected, product_precision(expected.dtype, self.device))

        return proven

    def _replayed(self) -> Tensor | None:
        with self.pool.alone():
            self._graph.replay()
            return None if self._found is None else self._found.clone()

    def _capture(self, function: Callable[[], Tensor | None]) -> None:
        graph, (pool, stream) = torch.cuda.CUDAGraph(), self.pool.place(self)
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                found = function()
        except RuntimeError as error:  # it asked the host for a number, or the graph has no room
            end_capture(graph, self.device, pool)
            self.refuse((str(error).strip().splitlines() or [""])[0])
        else:
            self._graph, self._found = graph, found


@cache  # of a command that does it for many prompts, once
def say_once(note: str) -> None:
    """Print a note on stderr, once in a process."""
    print(f"trimtab: note: {note}", file=sys.stderr, flush=True)


def end_capture(graph: Any, device: torch.device, pool: Any) -> None:
    """Let torch's allocator forget a capture that failed: until then it would give back no memory that several streams
    have used, and the pool would keep what the capture took."""
    try:
        graph.pool()
    except RuntimeError:  # where torch has not ended it, there is none to ask for
        with suppress(Exception):  # it had not even begun
            index = torch.cuda.current_device() if device.index is None else device.index
            torch._C._cuda_endAllocateToPool(index, pool)  # pyright: ignore[reportAttributeAccessIssue]
            torch._C._cuda_releasePool(index, pool)  # pyright: ignore[reportAttributeAccessIssue]


def are_near(found: Tensor, expected: Tensor, precision: ProductPrecision) -> bool:
    """Whether whole numbers and truths are equal, and others but for what rounding in a precision may make of them."""
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return False
    mine, other = (torch.where(expected.isfinite(), x, 0).double() for x in (found, expected))
    return float((mine - other).norm()) <= allowed_difference(precision) * float(other.norm())


def _pieces(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of two tensors of one shape, which need little memory to be worked on."""
    if not (one.is_contiguous() and other.is_contiguous()):
        return iter([(one, other)])
    return zip(one.view(-1).split(PIECE), other.view(-1).split(PIECE), strict=True)


def _bytes_of(one: Tensor) -> int:
    return one.numel() * one.element_size()


def _swap(one: Tensor, other: Tensor, aside: Tensor) -> None:
    """Exchange two tensors by way of some memory for their pieces, so that it needs no other, which may be lacking."""
    for mine, theirs in _pieces(one, other):
        kept = aside[: _bytes_of(mine)].view(mine.dtype).view(mine.shape)
        kept.copy_(mine)
        mine.copy_(theirs)
        theirs.copy_(kept)


def _distance(one: Tensor, other: Tensor) -> float:
    """The norm of the difference, of numbers that are finite in both; 0 for whole numbers."""
    if not one.is_floating_point():
        return 0.0
    squares = [
        torch.where(mine.isfinite() & theirs.isfinite(), mine - theirs, 0).double().square().sum()
        for mine, theirs in _pieces(one, other)
    ]
    return float(torch.stack(squares).sum().sqrt())


def _changed_alike(found: Tensor, expected: Tensor, change: float) -> bool:
    """Whether whole numbers and truths are equal, and others but for a small part of a change of this norm."""
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return False
    return _distance(found, expected) <= OF_CHANGE * change


def is_watched(hf: nn.Module) -> bool:
    """Whether somebody has a hook on a model. Those that `transformers` leaves behind do nothing."""
    hooks = (
        hook
        for module in hf.modules()
        for held in (module._forward_hooks, module._forward_pre_hooks)
        for hook in held.values()
    )
    return any(getattr(hook, "__module__", "") != IDLE for hook in hooks)
