"""Rows that join and leave a stream, against each decoded by itself; what they leave behind. Each check can fail."""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steering_checks import is_near_tie
from tiny_dictionary import make_dictionary
from torch import Tensor

from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import (
    DecodeConfig,
    DecodeStart,
    DecodeStream,
    EditLog,
    EditRequest,
    InterventionSource,
    LanguageModel,
    PromptCache,
    Row,
    decode,
    decode_stream,
    running,
)
from trimtab.lm.cache import GrowingLayer
from trimtab.lm.editing import SourceRunner
from trimtab.lm.running import RunningRows
from trimtab.steering import Choice, CombinedSource, RandomFeatureSource, ReplaySource, StaticSource, TopActiveSource

Patch = pytest.MonkeyPatch
MakeSource = Callable[[], InterventionSource | None]
TOLERANCE = 1e-4
EOS = 2


@dataclass
class Plan:
    """A row, the step before which it joins, and after how many of its tokens it is cancelled."""

    row: Row
    joins: int
    cancelled: int | None = None


def plans_of(n: int, seed: int, *, last_join: int, vocab_size: int) -> list[Plan]:
    """Rows of mixed lengths (beyond tiny Gemma's window of 8) and settings, some forced, taught, restricted, cut."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(6, 100) for _ in range(draw.randint(least, most))]

    plans = []
    for sample in range(n):
        new = draw.randint(1, 12)
        config = DecodeConfig(
            max_new_tokens=new,
            temperature=draw.choice((0.0, 0.7, 1.0, 1.0)),
            top_p=draw.choice((1.0, 0.8)),
            stop=draw.choice(((), ("a", "e", "1"), tuple("bcdfghjk"))),
            stop_at_eos=draw.random() < 0.5,
            seed=draw.randint(0, 3),
        )
        row = Row(tokens(1, 24), config, sample=sample, branch=draw.randint(0, 2))
        kind = draw.random()
        if kind < 0.15:
            row.forced = tokens(1, 6)
        elif kind < 0.3:
            row.teacher = [draw.choice((EOS, 20, 30, 40)) for _ in range(draw.randint(1, new + 2))]
        elif kind < 0.45:
            row.allowed = draw.sample(range(vocab_size), draw.randint(1, 9))
        plans.append(Plan(row, draw.randint(0, last_join), draw.randint(0, 3) if draw.random() < 0.15 else None))
    return plans


def play(stream: DecodeStream, plans: Iterable[Plan]) -> None:
    """Add and cancel rows as planned, until none is left."""
    to_come, mine, step = sorted(plans, key=lambda plan: plan.joins), dict[int, Plan](), 0

    def change() -> None:
        nonlocal step
        if len(stream) == 0 and to_come:
            step = max(step, to_come[0].joins)
        while to_come and to_come[0].joins <= step:
            plan = to_come.pop(0)
            mine[id(plan.row)] = plan
            stream.add(plan.row)
        for plan in mine.values():
            if plan.cancelled is not None and len(plan.row.token_ids) >= plan.cancelled:
                stream.cancel(plan.row)
        step += 1

    while to_come or len(stream):
        change()
        for _ in stream:
            change()


def check_rows_as_if_alone(
    model: LanguageModel,
    plans: list[Plan],
    make_source: MakeSource = lambda: None,
    *,
    batch_size: int = 64,
    prompt_cache: PromptCache | None = None,
    ahead: int = 1,
) -> int:
    """Every row of a stream is what its own decode gives. Returns at how many near-ties a token differed."""
    play(DecodeStream(model, make_source(), batch_size=batch_size, prompt_cache=prompt_cache, ahead=ahead), plans)
    near_ties = 0
    for plan in plans:
        row, seen = plan.row, list[Tensor]()
        alone = decode(
            model, [row.prompt], row.config, make_source(), forced=[row.forced], samples=[row.sample or 0],
            branches=[row.branch], teacher=None if row.teacher is None else [row.teacher],
            allowed=None if row.allowed is None else [row.allowed],
            observe=lambda *shown, seen=seen: seen.append(shown[2][0]),
        )  # fmt: skip
        same = len(row.token_ids)
        for step, (mine, other) in enumerate(zip(row.decided_ids, alone.decided_ids[0], strict=False)):
            if mine != other:
                logits = seen[step].clone()
                if row.allowed is not None:
                    logits[[token for token in range(len(logits)) if token not in row.allowed]] = -torch.inf
                position = len(row.prompt) + len(row.forced) + step - 1
                assert is_near_tie(logits, mine, other, row.config, row.sample or 0, position, row.branch)
                near_ties, same = near_ties + 1, step
                break
        for name in ("token_logp", "decided_logp", "entropy"):
            found, expected = (torch.tensor(values[:same]) for values in (getattr(row, name), getattr(alone, name)[0]))
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        if row.allowed is not None:
            found, expected = (torch.tensor(values[:same]) for values in (row.allowed_logp, alone.allowed_logp[0]))
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        if row.finish == "cancelled":
            assert len(row.token_ids) == plan.cancelled
        elif same == len(row.token_ids):
            assert (row.token_ids, row.text, row.finish) == (alone.token_ids[0], alone.texts[0], alone.finish[0])
            for name in ("site", "position", "feature"):
                assert torch.equal(row.edits.columns[name], alone.edits.columns[name]), name
            for name in ("coefficient", "x_norm"):
                torch.testing.assert_close(row.edits.columns[name], alone.edits.columns[name], atol=1e-3, rtol=1e-4)
    return near_ties


def sources_of(sae: Standard) -> dict[str, MakeSource]:
    return {
        "none": lambda: None,
        "static": lambda: StaticSource(sae, 3, 0.6),
        "everywhere": lambda: StaticSource(sae, [3, 5], [0.4, -0.3], positions="all"),
        "random": lambda: RandomFeatureSource(sae, 0.6, k=2),
        "context": lambda: TopActiveSource(sae, 0.6, over="context"),
        "combined": lambda: CombinedSource([StaticSource(sae, 3, 0.4), RandomFeatureSource(sae, 0.3, per="row")]),
    }


@pytest.mark.parametrize("source", ["none", "static", "everywhere", "random", "context", "combined"])
def test_fifty_rows_that_join_and_leave_are_as_if_alone(any_tiny: LanguageModel, sae: Standard, source: str) -> None:
    plans = plans_of(50, seed=1, last_join=40, vocab_size=any_tiny.vocab_size)
    assert check_rows_as_if_alone(any_tiny, plans, sources_of(sae)[source], batch_size=12) <= 2
    finished = {plan.row.finish for plan in plans}
    assert finished == {"eos", "stop", "length", "cancelled"}


def test_rows_that_join_may_come_from_kept_prompts(any_tiny: LanguageModel, sae: Standard) -> None:
    plans = plans_of(20, seed=2, last_join=10, vocab_size=any_tiny.vocab_size)
    for plan in plans:
        plan.row.prompt = [7, *plan.row.prompt]
    assert check_rows_as_if_alone(any_tiny, plans, sources_of(sae)["static"], prompt_cache=PromptCache(any_tiny)) <= 1


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 7), seed=st.integers(0, 10_000), last_join=st.integers(0, 12), batch_size=st.integers(1, 7),
    steered=st.booleans(),
)  # fmt: skip
def test_any_schedule_gives_rows_as_if_alone(
    any_tiny: LanguageModel, sae: Standard, n: int, seed: int, last_join: int, batch_size: int, steered: bool
) -> None:
    plans = plans_of(n, seed, last_join=last_join, vocab_size=any_tiny.vocab_size)
    source = sources_of(sae)["static" if steered else "none"]
    assert check_rows_as_if_alone(any_tiny, plans, source, batch_size=batch_size) <= 1


@pytest.mark.parametrize("steered", [False, True])
def test_copies_may_join_and_leave(any_tiny: LanguageModel, sae: Standard, steered: bool) -> None:
    """Copies share a prefill, and those of prompts that begin together are fed side by side."""
    config = DecodeConfig(max_new_tokens=7, temperature=1.0, seed=4, stop=("a", "e"))

    def source() -> InterventionSource | None:
        return RandomFeatureSource(sae, 0.5) if steered else None

    stream = DecodeStream(any_tiny, source())
    prompts = [[5 + i for i in range(n)] for n in (14, 1, 9, 20, 1)]
    rows = [[Row(prompt, config, sample=i, branch=branch) for branch in range(3)] for i, prompt in enumerate(prompts)]
    for copies in rows[:3]:
        stream.add(*copies)
    for number, step in enumerate(stream):
        if number == 1:
            stream.add(*rows[3])
            stream.add(*rows[4])
            stream.cancel(rows[3][0])  # the first, from which the others would have their prefill
        del step
    for row in (row for copies in rows for row in copies):
        alone = decode(any_tiny, [row.prompt], row.config, source(), samples=[row.sample or 0], branches=[row.branch])
        if row is rows[3][0]:
            assert (row.finish, row.token_ids, row.text, len(row.edits)) == ("cancelled", [], "", 0)
            continue
        assert (row.token_ids, row.finish) == (alone.token_ids[0], alone.finish[0])
        torch.testing.assert_close(torch.tensor(row.token_logp), torch.tensor(alone.token_logp[0]), atol=1e-4, rtol=0)
        assert torch.equal(row.edits.position, alone.edits.position)
        assert torch.equal(row.edits.feature, alone.edits.feature)


def sizes(*roots: object) -> dict[str, int]:
    """Tensors, their bytes, and entries of containers that can be reached, models left out."""
    seen, todo, found = set[int](), deque[Any](roots), {"tensors": 0, "bytes": 0, "entries": 0}
    while todo:
        thing = todo.popleft()
        if id(thing) in seen or isinstance(thing, LanguageModel | type):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found["tensors"] += 1
            found["bytes"] += thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            found["entries"] += len(thing)
            todo += thing.values()
        elif isinstance(thing, list | tuple | set | deque):
            found["entries"] += len(thing)
            todo += thing
        elif hasattr(thing, "__dict__") and not callable(thing):
            todo.append(vars(thing))
    return found


def check_nothing_stays_behind(model: LanguageModel, source: InterventionSource | None) -> None:
    """After 60 rows, some of them cancelled, stream and source are no larger than after 10, and know no row."""
    stream = DecodeStream(model, source, batch_size=6)
    gone: list[weakref.ref[Row]] = []
    after: list[dict[str, int]] = []

    def add() -> None:
        row = Row([5 + i for i in range(9)], DecodeConfig(max_new_tokens=6, stop_at_eos=False))
        gone.append(weakref.ref(row))
        stream.add(row)
        if len(gone) % 5 == 0:
            stream.cancel(row)

    add()
    for number, _step in enumerate(stream):
        if number % 2 == 0 and len(gone) < 60:
            add()
        if len(gone) in (10, 50) and number % 2:
            after.append(sizes(stream, source))
    assert after[0]["tensors"] > 20, "nothing is running, so nothing is measured"
    assert after[0] == after[-1]
    del _step
    assert not any(reference() for reference in gone)
    assert sizes(stream)["tensors"] <= sizes(DecodeStream(model, source))["tensors"] + 15
    assert len(stream) == 0


@pytest.mark.parametrize("source", ["none", "static", "random", "context"])
def test_nothing_stays_behind(any_tiny: LanguageModel, sae: Standard, source: str) -> None:
    check_nothing_stays_behind(any_tiny, sources_of(sae)[source]())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda sae: ReplaySource(EditLog.empty(), StaticSource(sae, 3)),
            "a row that joins a stream steered by ReplaySource: this source learns of all rows at the start; add the "
            "row before the first step, or begin another stream",
        ),
        (
            lambda sae: CombinedSource([StaticSource(sae, 3), ReplaySource(EditLog.empty(), StaticSource(sae, 3))]),
            "a row that joins a stream steered by ReplaySource: this source",
        ),
        (
            lambda sae: StaticSource(sae, torch.tensor([[3]])),
            "",
        ),
        (
            lambda sae: StaticSource(sae, torch.tensor([[3], [4]])),
            "a row that joins a stream in which each row has features of its own: there are none for it; give features "
            "for all rows alike, or add the row before the first step",
        ),
    ],
)
def test_sources_that_must_know_all_rows_are_refused(
    tiny_llama: LanguageModel, make: Callable[[Standard], InterventionSource], message: str
) -> None:
    stream = DecodeStream(tiny_llama, make(make_dictionary(tiny_llama)))
    config = DecodeConfig(max_new_tokens=4, stop_at_eos=False)
    rows = [Row([7, 8], config), Row([9], config)]
    for row in rows:
        stream.add(row)
    late = Row([5], config)
    for step in stream:
        if len(step.rows[0].token_ids) > 1 or late in step.rows:
            continue
        if message:
            with pytest.raises(UserError) as caught:
                stream.add(late)
            assert message in caught.value.line
        else:
            stream.add(late)
    assert [len(row.token_ids) for row in rows] == [4, 4]
    assert len(late.token_ids) == (0 if message else 4)
    if message:  # and may begin elsewhere
        other = DecodeStream(tiny_llama)
        other.add(late)
        assert len(list(other)) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([]), "the prompt: it is empty"),
        (Row([7, 160]), "the prompt: tiny-llama has tokens 0 to 159"),
        (Row([7], forced=[999]), "the prompt: tiny-llama has tokens 0 to 159"),
        (Row([7] * 250), "the prompt and 64 new tokens: together 314 tokens, but tiny-llama holds 256"),
        (Row([7], allowed=[]), "the list of allowed tokens of row 0: it is empty; give at least one token"),
        (Row([7], allowed=[160]), "the list of allowed tokens of row 0: tiny-llama has tokens 0 to 159"),
        (Row([7], teacher=[]), "the list of the teacher's tokens of row 0: it is empty; give at least one token"),
        (Row([7], teacher=[8, -1]), "the list of the teacher's tokens of row 0: tiny-llama has tokens 0 to 159"),
    ],
)
def test_bad_rows_are_refused_and_the_stream_goes_on(tiny_llama: LanguageModel, row: Row, message: str) -> None:
    stream = DecodeStream(tiny_llama)
    with pytest.raises(UserError) as caught:
        stream.add(row)
    assert message in caught.value.line
    assert len(stream) == 0
    good = Row([7], DecodeConfig(max_new_tokens=2, stop_at_eos=False))
    stream.add(good)
    assert [len(step.rows) for step in stream] == [1, 1]
    assert good.finish == "length"


def test_rows_are_added_once_and_cancelled_where_they_are(tiny_llama: LanguageModel) -> None:
    config = DecodeConfig(max_new_tokens=3, stop_at_eos=False)
    stream, row, twin = DecodeStream(tiny_llama), Row([7, 8], config), Row([7, 8], config)
    with pytest.raises(UserError, match="the row: it was added before and holds its results; make another Row"):
        stream.add(twin, twin)
    stream.add(row)
    for _ in stream:
        with pytest.raises(UserError, match="the row: it was added before"):
            stream.add(row)
    other = Row([7, 8], config)
    DecodeStream(tiny_llama).add(other)
    for elsewhere in (other, Row([7])):
        with pytest.raises(UserError, match="a row to cancel: it is not in this stream; cancel it where it was added"):
            stream.cancel(elsewhere)
    assert (len(row.token_ids), len(stream)) == (3, 0)
    stream.cancel(row)  # has ended by itself
    assert row.finish == "length"
    with pytest.raises(UserError, match="the row: it was added before"):
        stream.add(row)


def test_rows_cancelled_before_the_first_step_leave_no_gap(tiny_llama: LanguageModel) -> None:
    """A source is told of rows in the order in which requests count them, which features of their own rely on."""
    sae, config = make_dictionary(tiny_llama), DecodeConfig(max_new_tokens=3, stop_at_eos=False)
    stream = DecodeStream(tiny_llama, StaticSource(sae, torch.tensor([[1], [2], [3]]), 0.4))
    rows = [Row([7 + i, 8], config) for i in range(3)]
    for row in rows:
        stream.add(row)
    stream.cancel(rows[0])
    late = Row([30], config)
    stream.add(late)
    list(stream)
    assert [row.edits.feature.unique().tolist() for row in (*rows, late)] == [[], [1], [2], [3]]


def test_a_stream_in_which_a_step_failed_is_not_gone_on_with(tiny_llama: LanguageModel) -> None:
    """Some layers may hold the last token by then, and others not."""

    class Failing(StaticSource):
        def pick(self, request: EditRequest) -> Choice:
            if int(request.position.max()) == 3:
                raise UserError("the source", "it has had enough", "take another")
            return super().pick(request)

    stream = DecodeStream(tiny_llama, Failing(make_dictionary(tiny_llama), 3))
    stream.add(Row([7, 8, 9]))
    with pytest.raises(UserError, match="it has had enough"):
        list(stream)
    with pytest.raises(AssertionError, match="begin another stream"):
        list(stream)


def place_joined_rows_one_too_far(patch: Patch) -> None:
    original = RunningRows.join

    def join(self: RunningRows, other: RunningRows) -> None:
        original(self, other)
        self.held[-len(other.rows) :] += 1

    patch.setattr(RunningRows, "join", join)


def put_joined_rows_at_the_left(patch: Patch) -> None:
    def stacked(self: GrowingLayer, blocks: list[Tensor], length: int) -> Tensor:
        return torch.cat([torch.nn.functional.pad(block, (0, 0, 0, length - block.shape[2])) for block in blocks])

    patch.setattr(GrowingLayer, "_stacked", stacked)


def cut_the_first_token_of_those_that_run(patch: Patch) -> None:
    original = GrowingLayer.append
    patch.setattr(
        GrowingLayer, "append", lambda self, other, mine, *rest: original(self, other, max(1, mine - 1), *rest)
    )


def keep_a_neighbour_s_cache(patch: Patch) -> None:
    original = GrowingLayer.select
    patch.setattr(GrowingLayer, "select", lambda self, rows: original(self, (rows - 1).clamp_min(0)))


def drop_the_neighbour_of_a_row_that_leaves(patch: Patch) -> None:
    original = RunningRows.keep
    patch.setattr(RunningRows, "keep", lambda self, rows: original(self, rows[1:] or rows))


def share_settings(patch: Patch) -> None:
    original = decode_stream.ways_of
    patch.setattr(decode_stream, "ways_of", lambda rows: {next(iter(original(rows))): range(len(rows))})


def share_seeds(patch: Patch) -> None:
    original = decode_stream.uniform
    patch.setattr(decode_stream, "uniform", lambda seed, *rest: original(seed[0].expand_as(seed), *rest))


def key_draws_by_the_step(patch: Patch) -> None:
    original = decode_stream.uniform
    patch.setattr(
        decode_stream,
        "uniform",
        lambda seed, sample, branch, at: original(seed, sample, branch, at.max().expand_as(at)),
    )


def share_what_is_allowed(patch: Patch) -> None:
    original = running.pack_allowed
    patch.setattr(running, "pack_allowed", lambda rows, device: original(rows[::-1], device))


def start_with_another_row_s_activity(patch: Patch) -> None:
    """A row that joins goes on with the state of one that has left."""
    original = TopActiveSource.join

    def join(self: TopActiveSource, start: DecodeStart) -> None:
        before = {site: peak.clone() for site, peak in self._peak.items()}
        original(self, start)
        for site, peak in before.items():
            self._peak[site][: len(peak)] = peak

    patch.setattr(TopActiveSource, "join", join)


def keep_the_log(patch: Patch) -> None:
    original = SourceRunner.forget

    def forget(self: SourceRunner, numbers: Tensor) -> Any:
        parts = list(self._parts)
        found = original(self, numbers)
        self._parts = parts
        return found

    patch.setattr(SourceRunner, "forget", forget)


def never_use_an_index_again(patch: Patch) -> None:
    original = DecodeStream._leave

    def leave(self: DecodeStream, ended: list[Row]) -> None:
        original(self, ended)
        self._free, self._size = [], max(self._size, self._count)

    patch.setattr(DecodeStream, "_leave", leave)


def keep_padding_for_ever(patch: Patch) -> None:
    original = GrowingLayer.append
    patch.setattr(GrowingLayer, "append", lambda self, other, mine, *rest: original(self, other, self.length, *rest))


class Mutation(NamedTuple):
    apply: Callable[[Patch], None]
    source: str = "static"
    layout: str = "tiny_gemma3"


MUTATIONS = [
    Mutation(place_joined_rows_one_too_far),
    Mutation(place_joined_rows_one_too_far, "none", "tiny_gpt2"),
    Mutation(put_joined_rows_at_the_left),
    Mutation(cut_the_first_token_of_those_that_run, "none", "tiny_llama"),
    Mutation(keep_a_neighbour_s_cache),
    Mutation(drop_the_neighbour_of_a_row_that_leaves),
    Mutation(share_settings),
    Mutation(share_seeds, "none", "tiny_llama"),
    Mutation(key_draws_by_the_step),
    Mutation(share_what_is_allowed),
    Mutation(start_with_another_row_s_activity, "context"),
]
LEAKS = [
    Mutation(keep_the_log),
    Mutation(never_use_an_index_again, "context"),
    Mutation(keep_padding_for_ever, "none", "tiny_llama"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.apply.__name__}-{m.source}-{m.layout}")
def test_the_check_fails(mutation: Mutation, request: pytest.FixtureRequest, monkeypatch: Patch) -> None:
    model = request.getfixturevalue(mutation.layout)
    source = sources_of(make_dictionary(model))[mutation.source]
    plans = plans_of(20, seed=1, last_join=12, vocab_size=model.vocab_size)
    mutation.apply(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, KeyError)):
        assert check_rows_as_if_alone(model, plans, source, batch_size=8) <= 2


@pytest.mark.parametrize("mutation", LEAKS, ids=lambda m: f"{m.apply.__name__}-{m.source}-{m.layout}")
def test_a_leak_is_found(mutation: Mutation, request: pytest.FixtureRequest, monkeypatch: Patch) -> None:
    model = request.getfixturevalue(mutation.layout)
    source = sources_of(make_dictionary(model))[mutation.source]()
    mutation.apply(monkeypatch)
    with pytest.raises(AssertionError):
        check_nothing_stays_behind(model, source)
