"""Work at fixed addresses that a GPU replays as one graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.lm.graph_stand_in import StandIn, stand_in_for_graphs
from torch import Tensor, nn

from trimtab.lm import LanguageModel
from trimtab.lm import captured as captured_module
from trimtab.lm.captured import WARM, Captured, are_near, is_watched
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

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
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
