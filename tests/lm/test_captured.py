"""Work at fixed addresses that a GPU replays as one graph."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.lm.graph_stand_in import StandIn, stand_in_for_graphs
from tests.lm.taped_graphs import TapedGraph, tape_graphs
from torch import Tensor, nn

from trimtab.lm import LanguageModel
from trimtab.lm import captured as captured_module
from trimtab.lm.captured import CALLS_PER_CAPTURE, MOST_KEPT, WARM, Captured, are_near, is_watched
from trimtab.lm.precision import FLOAT32, ProductPrecision

CPU = torch.device("cpu")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    return stand_in_for_graphs(monkeypatch)


def add_one(x: Tensor) -> Tensor:
    return x + 1


def check_results(made: Captured) -> None:
    x, found = torch.zeros(3), []
    for call in range(WARM + 4):
        x.fill_(call)
        result = made(lambda: add_one(x), replay=True)
        assert result is not None
        found.append(result)
    for call, result in enumerate(found):  # looked at when all were made
        assert result.tolist() == [call + 1] * 3


def test_results_stay_as_they_are(graphs: list[StandIn]) -> None:
    check_results(Captured(CPU, "adding"))
    assert [graph.replays for graph in graphs] == [1 + 4]  # once beside a call, to see whether it does the same


def test_results_that_are_handed_out_as_they_are_change(graphs: list[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: self)  # mutation
    with pytest.raises(AssertionError):
        check_results(Captured(CPU, "adding"))


def test_on_a_cpu_each_call_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Captured, "_capture", lambda *_: pytest.fail("it was captured"))
    made = Captured(CPU, "adding")
    check_results(made)
    assert not made.may_replay(nn.Linear(2, 2))


def test_while_somebody_watches_each_call_is_made(graphs: list[StandIn]) -> None:
    """And the graph is there again afterwards."""
    made, model, calls = Captured(CPU, "adding"), nn.Sequential(nn.Linear(2, 2)), list[int]()

    def work() -> Tensor:
        calls.append(1)
        return torch.ones(2)

    for _ in range(WARM + 1):
        made(work, replay=made.may_replay(model))
    (graph,) = graphs
    handles = model[0].register_forward_hook(lambda *_: None), model[0].register_forward_pre_hook(lambda *_: None)
    for handle in handles:
        assert is_watched(model)
        before = len(calls)
        made(work, replay=made.may_replay(model))
        assert (graph.replays, len(calls)) == (2, before + 1)
        handle.remove()
    made(work, replay=made.may_replay(model))
    assert graph.replays == 3


def test_a_graph_that_gives_something_else_is_not_used(
    graphs: list[StandIn], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = StandIn.replay

    def replay(self: StandIn) -> None:
        real(self)
        assert self.found is not None
        self.found *= 1.001

    monkeypatch.setattr(StandIn, "replay", replay)
    captured_module.say_once.cache_clear()
    check_results(Captured(CPU, "adding"))
    assert [graph.replays for graph in graphs] == [1]
    assert capsys.readouterr().err.endswith(
        "adding is not captured as a graph, which is slower: its graph gives other numbers\n"
    )


@pytest.mark.parametrize(
    ("found", "near"),
    [
        ([1.0, 2.0], True),
        ([1.0, 2.0001], True),
        ([1.0, 2.001], False),
        ([1.0, float("nan")], False),
        ([0.0, 0.0], False),
    ],
)
def test_what_is_near(found: list[float], near: bool) -> None:
    assert are_near(torch.tensor(found, dtype=torch.float32), torch.tensor([1.0, 2.0]), FLOAT32) is near
    endless = torch.tensor([*found, float("-inf")])
    assert are_near(endless, torch.tensor([1.0, 2.0, float("-inf")]), FLOAT32) is near
    coarse = ProductPrecision("bfloat16", 2.0**-8)
    assert are_near(torch.tensor([1.0, 2.05]), torch.tensor([1.0, 2.0]), coarse)
    assert not are_near(torch.tensor([1, 3]), torch.tensor([1, 2]), coarse)


def test_hooks_that_transformers_leaves_do_not_watch(tiny_llama: LanguageModel) -> None:
    hf = copy.deepcopy(tiny_llama.hf)
    hf(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in hf.modules())
    assert not is_watched(hf)
    hf.lm_head.register_forward_hook(lambda *_: None)
    assert is_watched(hf)


class NoGraphs:
    """A card on which nothing can be captured."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")


def test_what_cannot_be_captured_is_called_each_time_and_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two that do the same."""

    class Context:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    class Graph:
        def pool(self) -> None:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    for name in ("device", "stream", "current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, Context)
    monkeypatch.setattr(torch.cuda, "graph", NoGraphs)
    captured_module.say_once.cache_clear()
    for _ in range(2):
        made = Captured(CPU, "adding")
        made.captures = True
        check_results(made)
        assert not made.captures
    assert capsys.readouterr().err == (
        "trimtab: note: adding is not captured as a graph, which is slower: "
        "operation not permitted when stream is capturing\n"
    )


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[TapedGraph]:
    captured_module.say_once.cache_clear()
    return tape_graphs(monkeypatch)


class Walk:
    """Adds what Python says to where it is, and counts."""

    def __init__(self) -> None:
        self.captured = Captured(CPU, "walking")
        self.at, self.count = torch.zeros(3), torch.zeros((), dtype=torch.long)

    def go(self, by: float, times: int = 1) -> None:
        def step() -> None:
            self.at += by * torch.ones(3)
            self.count += 1

        for _ in range(times):
            self.captured(step, replay=True, key=by, changes=lambda: [self.at, self.count])


def test_each_key_has_a_graph_of_its_own(taped: list[TapedGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_module, "CALLS_PER_CAPTURE", 0)
    walk, calls = Walk(), WARM + 3
    for _ in range(2):
        walk.go(1.0, calls)
        walk.go(2.0, calls)
    assert walk.at.tolist() == [2.0 * 3 * calls] * 3
    assert int(walk.count) == 4 * calls
    assert [graph.replays for graph in taped] == [3 + calls, 3 + calls]
    assert walk.captured.replays == 2 * (3 + calls)


def test_without_keys_a_graph_would_go_on_with_what_it_was_captured_of(taped: list[TapedGraph]) -> None:
    """Mutation."""
    walk = Walk()
    walk.captured._turn_to = lambda _: None  # type: ignore[method-assign]
    walk.go(1.0, WARM + 1)
    walk.go(2.0, 4)
    assert walk.at.tolist() == [WARM + 5.0] * 3


def test_few_graphs_are_kept(taped: list[TapedGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_module, "CALLS_PER_CAPTURE", 0)
    walk = Walk()
    for number in range(MOST_KEPT + 3):
        walk.go(float(number), WARM + 1)
    assert len(walk.captured._others) == MOST_KEPT
    walk.go(0.0)  # which has gone
    walk.go(float(MOST_KEPT + 1))
    assert [graph.replays for graph in taped] == [1] * (MOST_KEPT + 1) + [2, 1]


def test_what_keeps_changing_is_seldom_captured(taped: list[TapedGraph]) -> None:
    walk = Walk()
    for number in range(CALLS_PER_CAPTURE):
        walk.go(float(number), WARM + 2)
    assert len(taped) == WARM + 2


def test_a_graph_that_changes_something_else_is_undone(
    taped: list[TapedGraph], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers to a small part of the change, counts exactly."""
    real, expected = TapedGraph.replay, float(WARM + 4)
    for wrong in (0.2, 1, torch.nan):
        walk = Walk()

        def replay(self: TapedGraph, walk: Walk = walk, wrong: float = wrong) -> None:
            real(self)
            (walk.count if isinstance(wrong, int) else walk.at[1:2]).add_(wrong)

        monkeypatch.setattr(TapedGraph, "replay", replay)
        walk.go(1.0, WARM + 4)
        assert (walk.at.tolist(), int(walk.count)) == ([expected] * 3, expected)
        assert walk.captured.replays == 0
        assert not walk.captured.captures
    assert capsys.readouterr().err.count("walking is not captured as a graph, which is slower") == 1


@pytest.mark.parametrize("where", ["_distance", "replay", "_changed_alike"])
def test_without_room_to_compare_calls_are_made(
    where: str, taped: list[TapedGraph], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever came of the exchange until then."""

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    walk = Walk()
    monkeypatch.setattr(TapedGraph if where == "replay" else captured_module, where, no_room)
    walk.go(1.0, WARM + 4)
    assert (walk.at.tolist(), int(walk.count)) == ([WARM + 4.0] * 3, WARM + 4)
    assert not walk.captured.captures
    assert "slower: there is no room to try it\n" in capsys.readouterr().err


def test_an_exchange_takes_no_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_module, "PIECE", 2)
    one, other = torch.arange(6.0).reshape(2, 3), torch.full((2, 3), 7.0)
    aside = torch.empty(2 * 4, dtype=torch.uint8)
    monkeypatch.setattr(Tensor, "clone", lambda *_: pytest.fail("it was copied elsewhere"))
    captured_module._swap(one, other, aside)
    assert (one.tolist(), other.tolist()) == ([[7.0] * 3] * 2, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])


@pytest.mark.parametrize("where", ["the copy", "the call"])
def test_without_room_to_try_a_graph_calls_are_made(
    where: str, taped: list[TapedGraph], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    walk, clone = Walk(), Tensor.clone
    room = iter([*[True] * WARM, False, *[True] * 9])

    def step() -> None:
        walk.at += 1.0
        if where == "the call" and not next(room):
            raise torch.OutOfMemoryError("CUDA out of memory")
        walk.count += 1

    def no_room(self: Tensor) -> Tensor:
        if where == "the copy" and self is walk.count:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return clone(self)

    monkeypatch.setattr(Tensor, "clone", no_room)
    for _ in range(WARM + 3):
        walk.captured(step, replay=True, changes=lambda: [walk.at, walk.count])
    assert (walk.at.tolist(), int(walk.count)) == ([WARM + 3.0] * 3, WARM + 3)
    assert not taped
    assert "slower: there is no room to try it\n" in capsys.readouterr().err


def test_a_call_that_cannot_be_captured_is_made_once(
    taped: list[TapedGraph], capsys: pytest.CaptureFixture[str]
) -> None:
    walk = Walk()

    def step() -> None:
        walk.at += float(walk.count >= 0)
        walk.count += 1

    for _ in range(WARM + 3):
        walk.captured(step, replay=True, changes=lambda: [walk.at, walk.count])
    assert (walk.at.tolist(), int(walk.count)) == ([WARM + 3.0] * 3, WARM + 3)
    assert not walk.captured.is_captured
    assert "operation not permitted when stream is capturing" in capsys.readouterr().err


def test_a_pool_is_one_while_a_graph_is_in_it(taped: list[TapedGraph]) -> None:
    walks = [Walk(), Walk()]
    walks[0].go(1.0, WARM + 1)
    walks[1].go(1.0, WARM + 1)
    walks[1] = Walk()
    walks[1].go(1.0, WARM + 1)
    assert len({id(graph.pool()) for graph in taped}) == 1
    for one in walks:
        one.captured.refuse("it was enough")
    walks.append(Walk())
    walks[2].go(1.0, WARM + 1)
    assert len({id(graph.pool()) for graph in taped}) == 2


@pytest.mark.parametrize("ended", [False, True])
def test_a_capture_that_failed_is_ended(ended: bool, taped: list[TapedGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does so itself where the capture came to its end, as the graph then knows its pool."""
    said: list[tuple[str, int, Any]] = []
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        note = lambda index, pool, name=name: said.append((name, index, pool))  # noqa: E731
        monkeypatch.setattr(torch._C, name, note, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    def pool(self: TapedGraph) -> Any:
        if not ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool

    monkeypatch.setattr(TapedGraph, "pool", pool)
    walk = Walk()
    for _ in range(WARM + 1):
        walk.captured(lambda: walk.at.add_(float(walk.count)), replay=True)
    place = walk.captured.pool._place
    assert place is not None
    names = [] if ended else ["_cuda_endAllocateToPool", "_cuda_releasePool"]
    assert said == [(name, 3, place.handle) for name in names]


@pytest.mark.parametrize("mutated", [False, True])
def test_graphs_that_share_memory_are_replayed_one_at_a_time(
    mutated: bool, taped: list[TapedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one gives is copied before another thread's graph writes over it. Mutation: nobody waits for another."""
    inside, most, together, real = list[int](), list[int](), threading.Barrier(2), TapedGraph.replay

    def replay(self: TapedGraph) -> None:
        inside.append(1)
        if mutated:
            together.wait(timeout=60)
        most.append(len(inside))
        real(self)
        inside.pop()

    def work(x: Tensor, made: Captured) -> None:
        made(lambda: add_one(x), replay=True)

    given = [(torch.zeros(3), Captured(CPU, "adding")) for _ in range(2)]
    for x, made in given:
        for _ in range(WARM + 1):
            work(x, made)
    monkeypatch.setattr(TapedGraph, "replay", replay)
    if mutated:
        monkeypatch.setattr(captured_module.GraphPool, "alone", lambda _: nullcontext())
    threads = [threading.Thread(target=work, args=one) for one in given]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert max(most) == 1 + mutated


def test_what_never_settles_is_known_once(taped: list[TapedGraph]) -> None:
    walk, told = Walk(), list[bool]()
    for number in range(CALLS_PER_CAPTURE + 3):
        told.append(walk.captured.is_unsettled)
        walk.go(float(number))
    assert [place for place, one in enumerate(told) if one] == [CALLS_PER_CAPTURE]
    walk = Walk()
    walk.go(1.0, CALLS_PER_CAPTURE)
    assert not walk.captured.is_unsettled


@pytest.mark.gpu
def test_a_graph_is_what_it_was_captured_of() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    card = torch.device("cuda", torch.cuda.current_device())
    made, x, weight = Captured(card, "multiplying"), torch.zeros(4, 8, device=card), torch.randn(8, 8, device=card)
    found, expected = [], []
    for call in range(WARM + 4):
        x.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(call)))
        expected.append(x @ weight)
        found.append(made(lambda: x @ weight, replay=True))
    assert made._graph is not None
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=0, rtol=0)
