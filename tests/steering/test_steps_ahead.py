"""Steps that are taken before what they chose is looked at, against one by one; and that they ask the device nothing.

A GPU replays them as graphs; here they are taken as they are, which computes the same.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import setitem
from typing import Any

import pytest
import torch
from test_streaming import check_rows_as_if_alone, plans_of, sources_of
from tests.lm.graph_stand_in import StandIn, stand_in_for_graphs
from tests.lm.nothing_asked import AsksError, NothingAsked, take_a_cards_branches
from tiny_dictionary import make_dictionary
from torch import Tensor

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
    decoding,
    steps_ahead,
)
from trimtab.lm.captured import Captured
from trimtab.lm.chosen import Chosen, on_host, told
from trimtab.lm.editing import SourceRunner
from trimtab.lm.steps_ahead import Steps, can_step_ahead
from trimtab.policies.networks import Policy
from trimtab.policies.source import PolicySource
from trimtab.steering import (
    CombinedSource,
    DirectionTable,
    DivergenceRecorder,
    ReplaySource,
    StaticSource,
    trace_replay,
)
from trimtab.steering.random_arms import decode_controls
from trimtab.steering.trace import Trace
from trimtab.steering.trace_replay import replay_trace

Patch = pytest.MonkeyPatch
PROMPTS = [[7, 20, 31, 44, 50], [9, 12], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [30, 31, 32]]


@pytest.fixture
def sae(any_tiny: LanguageModel) -> Standard:
    return make_dictionary(any_tiny)


@pytest.fixture
def taken(monkeypatch: Patch) -> list[int]:
    """How many steps were taken ahead each time."""
    counts: list[int] = []
    monkeypatch.setattr(Steps, "take", _recorded(counts))
    return counts


def _recorded(counts: list[int]) -> Any:
    real = Steps.take

    def take(self: Steps, running: Any, way: Any, given: Any, count: int) -> Any:
        counts.append(count)
        return real(self, running, way, given, count)

    return take


@pytest.fixture
def ahead(monkeypatch: Patch) -> Callable[[int], None]:
    """Lets `decode` take so many steps ahead."""

    def let(steps: int) -> None:
        def stream(*args: Any, **settings: Any) -> DecodeStream:
            return DecodeStream(*args, **{**settings, "ahead": steps})

        monkeypatch.setattr(decoding, "DecodeStream", stream)

    return let


def check_alike(found: Decoded, expected: Decoded) -> None:
    assert (found.token_ids, found.decided_ids, found.finish) == (
        expected.token_ids, expected.decided_ids, expected.finish,
    )  # fmt: skip
    assert found.texts == expected.texts
    for name in ("token_logp", "decided_logp", "entropy"):
        for mine, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), atol=1e-4, rtol=0)
    for mine, other in zip(found.allowed_logp, expected.allowed_logp, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), atol=1e-4, rtol=0)
    assert len(found.edits) == len(expected.edits)
    for name, column in found.edits.columns.items():
        torch.testing.assert_close(column, expected.edits.columns[name], atol=1e-3, rtol=1e-4, equal_nan=True)


def new_policy(sae: Standard) -> Policy:
    return Policy.build(DirectionTable.of(sae).rows, hidden=(16,), seed=3)


SETTINGS = {
    "greedy": DecodeConfig(max_new_tokens=21, stop_at_eos=False),
    "sampled": DecodeConfig(max_new_tokens=21, temperature=0.8, seed=3),
    "nucleus": DecodeConfig(max_new_tokens=21, temperature=1.0, top_p=0.7, seed=4),
    "stops": DecodeConfig(max_new_tokens=40, temperature=1.0, seed=5, stop=("a", "e", "1")),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("steered", [False, True])
def test_decoding_ahead_is_decoding(
    any_tiny: LanguageModel, sae: Standard, name: str, steered: bool, ahead: Any, taken: list[int]
) -> None:
    """Prompts of different lengths, beyond tiny Gemma's window of 8, and caches that outgrow their first size."""

    def run() -> Decoded:
        source = StaticSource(sae, 3, 0.5) if steered else None
        return decode(any_tiny, [*PROMPTS, [*range(10, 60)]], SETTINGS[name], source)

    expected = run()
    ahead(5)
    check_alike(run(), expected)
    assert max(taken) == 5


@pytest.mark.parametrize("kind", ["allowed", "teacher", "repeats", "lengths", "forced"])
def test_every_way_of_decoding_goes_ahead(any_tiny: LanguageModel, kind: str, ahead: Any, taken: list[int]) -> None:
    given: dict[str, dict[str, Any]] = {
        "allowed": {"allowed": [[5, 9, 30], [80, 7, 7, 61], [1, 2, 3, 4], [40]]},
        "teacher": {"teacher": [[7, 8, 9, 10, 11, 12], [50, 2, 60, 70, 80, 90], [6] * 9, [4, 5, 6, 7, 8]]},
        "repeats": {"repeats": 3},
        "lengths": {"lengths": [6, 12, 9, 6]},
        "forced": {"forced": [[4, 5], [6], [9, 9, 9], [1, 2]]},
    }
    config = DecodeConfig(max_new_tokens=12, temperature=1.0, seed=2)
    expected = decode(any_tiny, PROMPTS, config, **given[kind])
    ahead(4)
    check_alike(decode(any_tiny, PROMPTS, config, **given[kind]), expected)
    assert taken


@pytest.mark.parametrize("source", ["none", "everywhere"])
@pytest.mark.parametrize("steps", [2, 8])
def test_rows_that_join_and_leave_are_as_if_alone(
    any_tiny: LanguageModel, sae: Standard, source: str, steps: int
) -> None:
    plans = plans_of(30, seed=steps, last_join=60, vocab_size=any_tiny.vocab_size)
    assert check_rows_as_if_alone(any_tiny, plans, sources_of(sae)[source], batch_size=6, ahead=steps) <= 2


@pytest.mark.parametrize("source", ["none", "static"])
def test_rows_that_choose_alike_join_and_leave(
    any_tiny: LanguageModel, sae: Standard, source: str, taken: list[int]
) -> None:
    plans = plans_of(40, seed=9, last_join=200, vocab_size=any_tiny.vocab_size)
    for plan in plans:
        stop = plan.row.config.stop
        plan.row.config = DecodeConfig(max_new_tokens=24, temperature=1.0, seed=1, stop=stop)
        plan.row.allowed = plan.row.teacher = None
    assert check_rows_as_if_alone(any_tiny, plans, sources_of(sae)[source], batch_size=4, ahead=7) <= 2
    assert len(taken) > 10


@pytest.mark.parametrize("mask", ["none", "accumulated"])
def test_a_policy_decides_the_same_and_forgets_what_is_behind_an_end(
    tiny_llama: LanguageModel, mask: Any, ahead: Any, taken: list[int]
) -> None:
    """Mutation: decisions of steps that were taken behind a row's end count."""
    sae = make_dictionary(tiny_llama)
    policy = new_policy(sae)
    config = DecodeConfig(max_new_tokens=30, temperature=1.0, seed=8, stop=("a", "e", "1"))

    def run() -> tuple[Decoded, PolicySource]:
        source = PolicySource(policy, sae, build_mask(mask, sae), 0.5)
        return decode(tiny_llama, PROMPTS, config, source), source

    expected, slow = run()
    ahead(8)
    found, fast = run()
    check_alike(found, expected)
    assert taken
    valid = slow.decisions.valid
    assert torch.equal(fast.decisions.valid, valid)
    assert torch.equal(fast.decisions.action[valid], slow.decisions.action[valid])
    torch.testing.assert_close(fast.decisions.observation[valid], slow.decisions.observation[valid], atol=1e-4, rtol=0)
    rows, steps = valid.nonzero(as_tuple=True)
    assert torch.equal(fast.decisions.allowed(rows, steps), slow.decisions.allowed(rows, steps))
    forgetful = PolicySource(policy, sae, build_mask(mask, sae), 0.5)
    forgetful.take_back = lambda ends: None  # type: ignore[method-assign]
    decode(tiny_llama, PROMPTS, config, forgetful)
    assert not torch.equal(forgetful.decisions.valid, valid)


@pytest.mark.parametrize("steered", ["static", "policy"])
def test_no_copy_of_a_row_writes_to_what_a_policy_keeps(
    tiny_llama: LanguageModel, steered: str, ahead: Any, monkeypatch: Patch
) -> None:
    """Rows that have left are filled up with copies of others, but not where a source keeps what it decides."""
    sae, copied = make_dictionary(tiny_llama), list[bool]()
    real = SourceRunner.aim

    def aim(self: SourceRunner, ids: Tensor, position: Tensor, rows: Any, which: Tensor, **how: Any) -> None:
        copied.append(len(set(rows.row.tolist())) < len(rows.row))
        real(self, ids, position, rows, which, **how)

    monkeypatch.setattr(SourceRunner, "aim", aim)
    ahead(4)
    sources: dict[str, Any] = {
        "static": StaticSource(sae, 3, 0.5),
        "policy": PolicySource(new_policy(sae), sae, build_mask("none", sae), 0.5),
    }
    decode(
        tiny_llama, PROMPTS, replace(SETTINGS["sampled"], max_new_tokens=24), sources[steered], lengths=[8, 24, 20, 24]
    )
    assert any(copied) == (steered == "static")


@pytest.fixture
def asking_refused(monkeypatch: Patch) -> None:
    """Steps run where asking the device for anything is an error, with sums and choices as they are made on a GPU."""
    step = steps_ahead._Shape._step

    def watched(self: Any) -> None:
        if not self.records:  # storage is made
            step(self)
            return
        with NothingAsked():
            step(self)

    monkeypatch.setattr(steps_ahead._Shape, "_step", watched)
    take_a_cards_branches(monkeypatch)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "source", ["none", "static", "everywhere", "policy", "accumulated", "combined", "replay", "recorded"]
)
def test_a_step_asks_the_device_nothing(
    tiny_gemma3: LanguageModel, name: str, source: str, ahead: Any, taken: list[int], asking_refused: None
) -> None:
    """So that it can be captured as a graph. Mutations: the tests below."""
    sae = make_dictionary(tiny_gemma3)
    made: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "static": lambda: StaticSource(sae, torch.tensor([[3], [4], [5], [6]]), 0.5),
        "everywhere": lambda: StaticSource(sae, [3, 5], [0.4, -0.3], positions="all", combine="total"),
        "policy": lambda: PolicySource(new_policy(sae), sae, build_mask("none", sae), 0.5),
        "accumulated": lambda: PolicySource(new_policy(sae), sae, build_mask("accumulated", sae), 0.5),
        "combined": lambda: CombinedSource([StaticSource(sae, 5, 0.3), made["policy"](), made["replay"]()]),
        "replay": lambda: ReplaySource(log.edits, StaticSource(sae, 3, 0.5)),
    }
    log = decode(tiny_gemma3, PROMPTS, SETTINGS[name], StaticSource(sae, 3, 0.5))
    ahead(6)
    if source == "recorded":
        steering = made["static"]()
        decode(tiny_gemma3, PROMPTS, SETTINGS[name], steering, observe=DivergenceRecorder(tiny_gemma3, steering))
    else:
        decode(tiny_gemma3, PROMPTS, SETTINGS[name], made[source]())
    assert taken


class Asking(StaticSource):
    """Says that it asks nothing."""

    def __init__(self, sae: Standard, ask: Callable[[Any], object]) -> None:
        super().__init__(sae, 3, 0.5)
        self.ask = ask

    @property
    def asks_nothing(self) -> bool:
        return True

    def pick(self, request: Any) -> Any:
        self.ask(request)
        return super().pick(request)


@pytest.mark.parametrize(
    "ask",
    [
        lambda request: request.x.sum().item(),
        lambda request: bool((request.x > 0).any()),
        lambda request: (request.x > 0).nonzero(),
        lambda request: request.x[request.x > 0],
        lambda request: request.token.unique(),
        lambda request: setitem(request.x.clone(), request.row, 1.0),
    ],
)
def test_a_step_that_asks_is_noticed(
    tiny_llama: LanguageModel, ask: Callable[[Any], object], ahead: Any, asking_refused: None
) -> None:
    ahead(6)
    with pytest.raises(AsksError):
        decode(tiny_llama, PROMPTS, SETTINGS["greedy"], Asking(make_dictionary(tiny_llama), ask))


def test_a_nucleus_that_is_tried_in_few_tokens_first_asks(
    tiny_llama: LanguageModel, ahead: Any, asking_refused: None, monkeypatch: Patch
) -> None:
    real = steps_ahead.choose
    monkeypatch.setattr(steps_ahead, "choose", lambda *args, **given: real(*args, **{**given, "first": 4}))
    ahead(6)
    with pytest.raises(AsksError):
        decode(tiny_llama, PROMPTS, SETTINGS["nucleus"])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("source", ["none", "static", "accumulated"])
def test_a_graph_is_tried_beside_a_step_and_then_replayed(
    tiny_gemma3: LanguageModel, name: str, source: str, ahead: Any, monkeypatch: Patch
) -> None:
    """With a stand-in for graphs, which does what was captured at the addresses that it had then."""
    sae = make_dictionary(tiny_gemma3)

    def run() -> tuple[Decoded, Any]:
        steering: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "static": lambda: StaticSource(sae, 3, 0.5),
            "accumulated": lambda: PolicySource(new_policy(sae), sae, build_mask("accumulated", sae), 0.5),
        }
        made = steering[source]()
        config = replace(SETTINGS[name], max_new_tokens=40)
        return decode(tiny_gemma3, PROMPTS, config, made), getattr(made, "decisions", None)

    expected, decided = run()
    graphs = stand_in_for_graphs(monkeypatch)
    ahead(5)
    found, decisions = run()
    check_alike(found, expected)
    assert max(graph.replays for graph in graphs) > 10
    if decided is not None:
        valid = decided.valid
        assert torch.equal(decisions.valid, valid)
        assert torch.equal(decisions.action[valid], decided.action[valid])


@pytest.mark.parametrize("what", ["ids", "held", "place"])
def test_a_graph_that_does_something_else_is_not_used(
    tiny_llama: LanguageModel, what: str, ahead: Any, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = decode(tiny_llama, PROMPTS, SETTINGS["sampled"])
    graphs, real = stand_in_for_graphs(monkeypatch), StandIn.replay

    def replay(self: StandIn) -> None:
        shape = self.function.__self__  # type: ignore[attr-defined]
        getattr(shape, what).add_(1)  # the mutation
        real(self)

    monkeypatch.setattr(StandIn, "replay", replay)
    captured.say_once.cache_clear()
    ahead(5)
    check_alike(decode(tiny_llama, PROMPTS, SETTINGS["sampled"]), expected)
    assert graphs
    assert all(graph.replays == 1 for graph in graphs)
    assert "is not captured as a graph, which is slower: its graph gives other numbers" in capsys.readouterr().err


def test_a_few_steps_are_not_captured(tiny_llama: LanguageModel, ahead: Any, monkeypatch: Patch) -> None:
    graphs = stand_in_for_graphs(monkeypatch)
    ahead(5)
    decode(tiny_llama, PROMPTS, DecodeConfig(max_new_tokens=15, stop_at_eos=False))
    assert not graphs
    decode(tiny_llama, PROMPTS, DecodeConfig(max_new_tokens=30, stop_at_eos=False))
    assert graphs


def test_without_room_for_it_steps_are_taken_one_by_one(
    tiny_llama: LanguageModel, ahead: Any, taken: list[int], monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where room is lacking in the middle of a step."""
    expected = decode(tiny_llama, PROMPTS, SETTINGS["sampled"], StaticSource(make_dictionary(tiny_llama), 3, 0.5))
    real, calls = steps_ahead._Shape._step, itertools.count()

    def full(self: Any) -> None:
        real(self)
        if next(calls) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps_ahead._Shape, "_step", full)
    ahead(5)
    found = decode(tiny_llama, PROMPTS, SETTINGS["sampled"], StaticSource(make_dictionary(tiny_llama), 3, 0.5))
    check_alike(found, expected)
    assert len(taken) == 2
    assert "trimtab: note: decoding is slower for want of memory; lower the batch size" in capsys.readouterr().err


def test_sources_that_ask_are_taken_step_by_step(tiny_llama: LanguageModel, ahead: Any, taken: list[int]) -> None:
    class Counting(StaticSource):
        """Keeps something in Python, which a graph would leave as it was."""

    sae = make_dictionary(tiny_llama)
    sources: Sequence[Any] = [
        PolicySource(new_policy(sae), sae, build_mask("current", sae), 0.5),
        StaticSource(sae, 3, 0.5, positions="1:4"),
        StaticSource(sae, 3, 0.5, operation="overwrite"),
        StaticSource(sae, 3, operation="ablate"),
        Counting(sae, 3, 0.5),
        CombinedSource([StaticSource(sae, 3, 0.5), Counting(sae, 3, 0.5)]),
    ]
    ahead(6)
    for source in sources:
        decode(tiny_llama, PROMPTS, SETTINGS["greedy"], source)
    assert not taken
    decode(tiny_llama, PROMPTS, SETTINGS["greedy"], StaticSource(sae, 3, 0.5))
    assert taken


def test_a_replay_of_steps_that_were_taken_ahead_has_their_bits(tiny_llama: LanguageModel, ahead: Any) -> None:
    """Rows that end within a batch of steps, too, whose copies go on in both."""
    sae, config = make_dictionary(tiny_llama), SETTINGS["stops"]
    ahead(8)
    found = decode(tiny_llama, PROMPTS, config, StaticSource(sae, 3, 0.5))
    again = decode(
        tiny_llama, PROMPTS, config, ReplaySource(found.edits, StaticSource(sae, 3, 0.5)), teacher=found.token_ids
    )
    assert len({len(row) for row in found.token_ids}) > 1
    assert (again.token_ids, again.decided_ids, again.token_logp) == (
        found.token_ids, found.decided_ids, found.token_logp,
    )  # fmt: skip


def test_a_run_is_replayed_in_the_steps_that_it_was_taken_in(
    tiny_llama: LanguageModel, ahead: Any, taken: list[int], monkeypatch: Patch
) -> None:
    """Arms and their controls, whose texts have given lengths. Mutation: a replay that is not told how long they are.

    Where steps are looked at says which rows are computed together, and so the last bits on a GPU.
    """
    sae, config = make_dictionary(tiny_llama), SETTINGS["stops"]
    source = StaticSource(sae, 3, 0.5)
    ahead(8)
    decoded = decode(tiny_llama, PROMPTS, config, source)
    kept: dict[str, Any] = {"rows": range(4), "pool": {source.sites[0]: DirectionTable.of(sae)}, "exclude": (3,)}
    both = decode_controls(tiny_llama, decoded, source, config, **kept)
    short = decode(tiny_llama, PROMPTS, config, source, lengths=[9, 11, 5, 3])
    joined, counts = Decoded.joined([both.decoded, short]), taken.copy()
    branches = [*[0] * 4, *[1] * 4, *[2] * 4]
    assert joined.ahead == [8] * 4 + [1] * 4 + [8] * 4
    trace = Trace.of(tiny_llama, joined, config, both.source, branches=branches, calls=[4, 4, 4])
    monkeypatch.setattr(decoding, "DecodeStream", DecodeStream)
    taken.clear()
    assert replay_trace(tiny_llama, trace, both.source).exact
    assert taken == counts
    monkeypatch.setattr(trace_replay, "_given_length", lambda _row, _tokens, config: config.max_new_tokens)
    taken.clear()
    replay_trace(tiny_llama, trace, both.source)
    assert taken != counts


def test_a_policy_beside_another_source_forgets_what_is_behind_an_end(tiny_llama: LanguageModel, ahead: Any) -> None:
    sae, config = make_dictionary(tiny_llama), SETTINGS["stops"]

    def run() -> PolicySource:
        policy = PolicySource(new_policy(sae), sae, build_mask("none", sae), 0.5)
        decode(tiny_llama, PROMPTS, config, CombinedSource([StaticSource(sae, 3, 0.2), policy]))
        return policy

    expected = run()
    ahead(8)
    assert torch.equal(run().decisions.valid, expected.decisions.valid)


def test_what_is_told_at_once_is_what_was_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    ids, decided = torch.randint(300_000, (2, 3, 5), generator=generator)
    logp, decided_logp, entropy = torch.randn(3, 3, 5, generator=generator)
    chosen = Chosen(ids, decided, logp, decided_logp, entropy, torch.randn(3, 5, 7, generator=generator))
    of_one_step: list[Any] = [column[0] for column in chosen if column is not None]
    for one in (chosen, chosen._replace(allowed_logp=None), Chosen(*of_one_step)):
        assert told(on_host(one)) == told(one)


def test_what_observes_sees_each_step(tiny_llama: LanguageModel) -> None:
    with pytest.raises(UserError, match="ahead = 4: what observes is shown each step"):
        decode(tiny_llama, PROMPTS, observe=lambda *_: None, ahead=4)


@pytest.mark.parametrize("steps", [0, -3])
def test_so_few_steps_are_refused(tiny_llama: LanguageModel, steps: int) -> None:
    with pytest.raises(UserError, match=f"ahead = {steps}: it must be at least 1"):
        decode(tiny_llama, PROMPTS, ahead=steps)


def test_a_model_that_fails_the_trial_is_asked_at_each_step(
    tiny_llama: LanguageModel, ahead: Any, taken: list[int], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(steps_ahead, "_able", {tiny_llama.hf: {}})
    monkeypatch.setattr(steps_ahead, "_trial", lambda *_: False)
    ahead(6)
    decode(tiny_llama, PROMPTS, SETTINGS["greedy"])
    assert not taken


def test_rows_that_choose_in_different_ways_are_taken_step_by_step(tiny_llama: LanguageModel, taken: list[int]) -> None:
    stream = DecodeStream(tiny_llama, ahead=4)
    rows = [Row(PROMPTS[0], DecodeConfig(max_new_tokens=9, temperature=t, stop_at_eos=False)) for t in (0.0, 1.0)]
    stream.add(rows[0])
    stream.add(rows[1])
    assert all(step.logits is not None for step in stream)
    assert not taken
    assert [len(row.token_ids) for row in rows] == [9, 9]


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_token_in_the_wrong_place_fails_the_trial(any_tiny: LanguageModel, wrong: int, monkeypatch: Patch) -> None:
    """Mutation of what a position is."""
    assert can_step_ahead(any_tiny, None)
    monkeypatch.setattr(steps_ahead, "_able", {any_tiny.hf: {}})
    real = steps_ahead.slotted_logits

    def shifted(model: Any, cache: Any, ids: Tensor, held: Tensor, place: Tensor, places: Tensor) -> Tensor:
        return real(model, cache, ids, held + wrong, place, places)

    monkeypatch.setattr(steps_ahead, "slotted_logits", shifted)
    assert not can_step_ahead(any_tiny, None)


def test_few_shapes_are_held_at_once(tiny_llama: LanguageModel, monkeypatch: Patch) -> None:
    """However rows come and go."""
    sizes: list[int] = []
    real = Steps.take

    def take(self: Steps, *args: Any) -> Any:
        found = real(self, *args)
        sizes.append(len(self._shapes))
        return found

    monkeypatch.setattr(Steps, "take", take)
    stream = DecodeStream(tiny_llama, batch_size=16, ahead=2)
    for length in range(1, 40):
        stream.add(Row(PROMPTS[0], DecodeConfig(max_new_tokens=5 + length * 4, stop_at_eos=False)))
    for _ in stream:
        pass
    assert max(sizes) == steps_ahead.GRAPHS


def test_a_model_that_somebody_watches_is_not_captured(
    tiny_llama: LanguageModel, ahead: Any, monkeypatch: Patch
) -> None:
    """A graph would leave the hook out. Here the capture stands in for one: whoever gets there is noticed."""
    captures: list[bool] = []
    made = Captured.__init__

    def on_a_card(self: Any, *args: Any) -> None:
        made(self, *args)
        self.captures = True

    def capture(self: Any, _step: Any) -> None:
        captures.append(True)
        self.captures = False

    monkeypatch.setattr(Captured, "__init__", on_a_card)
    monkeypatch.setattr(Captured, "_capture", capture)
    ahead(4)
    model, seen = LanguageModel(copy.deepcopy(tiny_llama.hf), tiny_llama.tokenizer, "fresh"), list[int]()
    handle = model.layout.layers[1].module.register_forward_hook(lambda *_: seen.append(1))
    try:
        decode(model, PROMPTS, SETTINGS["greedy"])
    finally:
        handle.remove()
    assert not captures
    assert len(seen) >= SETTINGS["greedy"].max_new_tokens
    decode(model, PROMPTS, SETTINGS["greedy"])
    assert captures
