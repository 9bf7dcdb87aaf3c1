"""Decoding on a card: replayed graphs beside the steps that they stand for, replays of logs, memory.

What can be is run on the CPU as well, with a stand-in for graphs; `test_steps_ahead` has graphs that do something else.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.lm.nothing_asked import take_a_cards_branches
from tests.lm.taped_graphs import TapedGraph, tape_graphs
from tiny_dictionary import make_dictionary

from trimtab.control.masks import build_mask
from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import (
    DecodeConfig,
    Decoded,
    DecodeStream,
    LanguageModel,
    Row,
    captured,
    decode,
)
from trimtab.lm.captured import Captured
from trimtab.policies.networks import Policy
from trimtab.policies.source import PolicySource
from trimtab.steering import DirectionTable, ReplaySource, StaticSource

Patch = pytest.MonkeyPatch
PROMPTS = [[7, 20, 31, 44, 50], [9, 12], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [*range(10, 60)]]
"""Of unlike lengths, the longest of which outgrows the first size of caches."""
AHEAD, NEW = 8, 40
CONFIGS = {
    "greedy": DecodeConfig(max_new_tokens=NEW, stop_at_eos=False),
    "sampled": DecodeConfig(max_new_tokens=NEW, temperature=0.8, seed=3),
    "nucleus": DecodeConfig(max_new_tokens=NEW, temperature=1.0, top_p=0.7, seed=4),
    "stops": DecodeConfig(max_new_tokens=NEW, temperature=1.0, seed=5, stop=("a", "e", "1")),
    "allowed": DecodeConfig(max_new_tokens=NEW, temperature=1.0, seed=6, stop_at_eos=False),
}
ALLOWED = [[5, 9, 30], [80, 7, 7, 61], [11, 12, 13, 14], [40, 41]]
CARD = pytest.param("card", marks=pytest.mark.gpu)


@pytest.fixture(params=["stand-in", CARD])
def place(request: pytest.FixtureRequest) -> str:
    if request.param == "card" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return request.param


@pytest.fixture
def load(place: str, tiny_gemma3: LanguageModel) -> Callable[[str], LanguageModel]:
    """A model with windows in some layers, where it is to be, in a precision."""

    def loaded(dtype: str) -> LanguageModel:
        hf = copy.deepcopy(tiny_gemma3.hf).to("cuda" if place == "card" else "cpu", getattr(torch, dtype))
        return LanguageModel(hf, tiny_gemma3.tokenizer, f"{dtype} on the {place}")

    return loaded


@pytest.fixture
def graphs(place: str, monkeypatch: Patch) -> list[Any]:
    """What is captured from now on, None where it could not be."""
    if place == "stand-in":
        take_a_cards_branches(monkeypatch)
        return tape_graphs(monkeypatch)  # type: ignore[return-value]
    made, real = list[Any](), Captured._capture

    def capture(self: Captured, step: Any) -> None:
        real(self, step)
        made.append(self._graph)

    monkeypatch.setattr(Captured, "_capture", capture)
    return made


@contextmanager
def uncaptured() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "WARM", 10**9)
        yield


def source_of(name: str, model: LanguageModel, sae: Standard) -> Any:
    if name == "none":
        return None
    if name == "static":
        return StaticSource(sae, 3, 0.5)
    policy = Policy.build(DirectionTable.of(sae).rows.cpu(), hidden=(16,), seed=3).to(model.device)
    return PolicySource(policy, sae, build_mask("accumulated", sae), 0.5)


def check_same(found: Decoded, expected: Decoded) -> None:
    """To the last bit."""
    for name in (
        "token_ids",
        "decided_ids",
        "token_logp",
        "decided_logp",
        "entropy",
        "finish",
        "texts",
        "allowed_logp",
    ):
        assert getattr(found, name) == getattr(expected, name), name
    for name, column in found.edits.columns.items():
        torch.testing.assert_close(column, expected.edits.columns[name], atol=0, rtol=0, equal_nan=True)


def check_near(found: Decoded, expected: Decoded) -> None:
    """Of the same tokens, to what rounding to bfloat16 makes of log-probabilities."""
    assert found.token_ids == expected.token_ids
    for mine, other in zip(found.token_logp, expected.token_logp, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), atol=0.1, rtol=0.05)


def was_captured(graphs: Sequence[Any]) -> bool:
    taped = [graph for graph in graphs if isinstance(graph, TapedGraph)]
    return bool(graphs) and None not in graphs and all(graph.replays > 1 for graph in taped)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("source", ["none", "static", "policy"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_steps_are_the_steps(load: Any, graphs: list[Any], name: str, source: str, dtype: str) -> None:
    """Over lengths, ways of choosing, stops, and what steers; in bfloat16 of the same tokens, to rounding."""
    model = load(dtype)
    sae = make_dictionary(model)
    allowed = ALLOWED if name == "allowed" else None

    def run(teacher: Any = None) -> Decoded:
        steering = source_of(source, model, sae)
        return decode(model, PROMPTS, CONFIGS[name], steering, ahead=AHEAD, allowed=allowed, teacher=teacher)

    with uncaptured():
        expected = run()
    if dtype == "float32":
        check_same(run(), expected)
    else:
        with uncaptured():
            expected = run(expected.token_ids)
        check_near(run(expected.token_ids), expected)
    assert was_captured(graphs)


@pytest.mark.parametrize("source", ["none", "static"])
def test_rows_that_join_and_leave_are_replayed_as_they_are_taken(load: Any, graphs: list[Any], source: str) -> None:
    model = load("float32")
    sae = make_dictionary(model)

    def run() -> list[Row]:
        stream = DecodeStream(model, source_of(source, model, sae), batch_size=3, ahead=AHEAD)
        rows = [
            Row(PROMPTS[i % 4], replace(CONFIGS["stops"], max_new_tokens=24 + 5 * i, stop=("a",) * (i % 2)))
            for i in range(7)
        ]
        stream.add(rows[0])
        to_come = iter(rows[1:])
        for number, _ in enumerate(stream):
            if number % 3 == 0 and (row := next(to_come, None)) is not None:
                stream.add(row)
            if number == 20:
                stream.cancel(rows[2])
        return rows

    with uncaptured():
        expected = run()
    for mine, other in zip(run(), expected, strict=True):
        assert (mine.token_ids, mine.token_logp, mine.finish, mine.text) == (
            other.token_ids, other.token_logp, other.finish, other.text,
        )  # fmt: skip
    assert was_captured(graphs)


@pytest.mark.parametrize("name", ["greedy", "sampled", "stops"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_has_the_bits_of_what_it_replays(load: Any, graphs: list[Any], name: str, dtype: str) -> None:
    """At equal batch, on the card in both precisions. Mutation: an edit less."""
    model = load(dtype)
    source = StaticSource(make_dictionary(model), 3, 0.5)
    found = decode(model, PROMPTS, CONFIGS[name], source, ahead=AHEAD)

    def replayed(log: Any) -> Decoded:
        replay = ReplaySource(log, source)
        return decode(model, PROMPTS, CONFIGS[name], replay, teacher=found.token_ids, ahead=AHEAD)

    again = replayed(found.edits)
    assert (again.token_ids, again.decided_ids, again.token_logp) == (
        found.token_ids, found.decided_ids, found.token_logp,
    )  # fmt: skip
    assert was_captured(graphs)
    less = replace(found.edits, coefficient=found.edits.coefficient.index_fill(0, torch.tensor([0]), 0.0))
    assert replayed(less).token_logp != found.token_logp


def held(place: str) -> dict[str, int]:
    gc.collect()
    found = {"objects": len(gc.get_objects())}
    if place == "card":
        torch.cuda.synchronize()
        found |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    return found


def check_nothing_is_left(decodes: int, run: Callable[[int], object], place: str) -> None:
    """After so many decodes no more is held than after 20: of memory 1 MiB, 8 MiB that torch has put by, and 1,000 of
    Python's objects aside."""
    after: dict[int, dict[str, int]] = {}
    for number in range(decodes):
        run(number)
        if number in (20, decodes - 1):
            after[number] = held(place)
    most = {"objects": 1000, "allocated": 2**20, "reserved": 2**23}
    for name, value in after[decodes - 1].items():
        assert value <= after[20][name] + most[name], name


def test_decodes_leave_nothing_behind(load: Any, graphs: list[Any], place: str) -> None:
    """A thousand on the card, 40 elsewhere. Mutation: whoever keeps what was decoded."""
    model = load("float32")
    sae = make_dictionary(model)
    config = replace(CONFIGS["greedy"], max_new_tokens=21)

    def run(number: int) -> Decoded:
        source = StaticSource(sae, number % 40, 0.5) if number % 2 else None
        found = decode(model, PROMPTS[:3], config, source, ahead=AHEAD)
        graphs.clear()  # this list is not to keep them
        return found

    check_nothing_is_left(1000 if place == "card" else 40, run, place)
    kept: list[Any] = []
    with pytest.raises(AssertionError):
        check_nothing_is_left(40, lambda number: kept.append((run(number), [[number] for _ in range(99)])), place)


@pytest.mark.gpu
def test_rows_that_a_card_does_not_hold_are_counted(tiny_llama: LanguageModel) -> None:
    """In one line, with how many would fit."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    model = LanguageModel(copy.deepcopy(tiny_llama.hf).cuda(), tiny_llama.tokenizer, "on the card")
    prompts, config = [[7] * 200] * 65_536, DecodeConfig(max_new_tokens=2, stop_at_eos=False, batch_size=65_536)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with pytest.raises(UserError, match=r"has no room for decoding them; lower the batch size to \d+"):
            decode(model, prompts, config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.mark.gpu
def test_a_shape_that_was_not_captured_yet_is(tiny_llama: LanguageModel, monkeypatch: Patch) -> None:
    """A batch of another size and a longer cache in one stream each get a graph of their own."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    made, real = list[Any](), Captured._capture

    def capture(self: Captured, step: Any) -> None:
        real(self, step)
        made.append(self._graph)

    monkeypatch.setattr(Captured, "_capture", capture)
    model = LanguageModel(copy.deepcopy(tiny_llama.hf).cuda(), tiny_llama.tokenizer, "on the card")
    config = DecodeConfig(max_new_tokens=100, stop_at_eos=False)
    found = decode(model, [[7, 8, 9]] * 8, config, lengths=[20] * 6 + [100] * 2, ahead=AHEAD)
    assert [len(row) for row in found.token_ids] == [20] * 6 + [100] * 2
    assert len(made) >= 3
    assert None not in made
