"""Traces: their columns against the decode call they describe, the way to disk and back, replay from disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from steering_checks import LENGTHS, prompts_of, random_directions
from tiny_dictionary import make_dictionary

from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, Decoded, Edit, EditRequest, InterventionSource, LanguageModel, decode
from trimtab.runs import Run
from trimtab.steering import (
    CombinedSource,
    DirectionTable,
    PatchSource,
    RandomFeatureSource,
    ReplaySource,
    StaticSource,
    Trace,
    replay_trace,
    token_effects,
)

CONFIG = DecodeConfig(max_new_tokens=6, temperature=0.9, top_p=0.95, seed=4, stop=("e", "1", "Q"), batch_size=4)


def traced(model: LanguageModel, source: InterventionSource, repeats: int = 1) -> tuple[Decoded, Trace]:
    decoded = decode(model, prompts_of(LENGTHS), CONFIG, source, repeats=repeats)
    effects = token_effects(model, decoded, source, top_k=2)
    return decoded, Trace.of(model, decoded, CONFIG, source, effects=effects, run="r")


def test_columns_are_those_of_the_design(tiny_llama: LanguageModel) -> None:
    sae = make_dictionary(tiny_llama)
    _, trace = traced(tiny_llama, StaticSource(sae, [3, 5], [0.4, -0.2]))
    assert {
        "run", "sample", "branch", "parent_branch", "position", "token_id", "text", "token_logp", "entropy", "value",
        "reward", "kl_local", "kl_total", "top_with", "top_without",
    } <= set(trace.tokens.schema.names)  # fmt: skip
    assert {
        "sample", "branch", "position", "site", "operation", "feature", "unit", "requested_dose", "applied_dose",
        "relative_dose", "action_logp", "n_allowed", "dictionary_hash",
    } <= set(trace.edits.schema.names)  # fmt: skip


def test_every_token_and_edit_is_there(any_tiny: LanguageModel, sae: Standard) -> None:
    source = StaticSource(sae, [3, 5], [0.4, -0.2])
    decoded, trace = traced(any_tiny, source)
    assert trace.per_row("token_id") == decoded.token_ids
    for row, tokens in enumerate(decoded.token_ids):
        first = len(decoded.prompts[row])
        assert trace.per_row("position")[row] == list(range(first, first + len(tokens)))
        assert trace.per_row("token_logp")[row] == pytest.approx(decoded.token_logp[row], abs=0)
    rows = trace.edits.to_pylist()
    assert len(rows) == 2 * sum(map(len, decoded.token_ids))
    for row in rows:
        requested = {3: 0.4, 5: -0.2}[row["feature"]]
        assert row["requested_dose"] == pytest.approx(requested)
        assert row["applied_dose"] == pytest.approx(requested * row["x_norm"], rel=1e-5)
        assert row["relative_dose"] == pytest.approx(requested, rel=1e-5)
        assert (row["unit"], row["operation"], row["site"]) == ("relative", "add", "resid_post.1")
        assert row["dictionary_hash"] == sae.fingerprint
        assert row["action_logp"] is None
        assert row["n_allowed"] is None


def test_a_token_carries_what_acted_on_its_choice(tiny_llama: LanguageModel) -> None:
    """Values are logged at the input position, tokens stand one later; rewards stand at the last token."""
    sae = make_dictionary(tiny_llama)

    class Valued(StaticSource):
        def choose(self, request: EditRequest) -> Edit:
            edit = super().choose(request)
            assert edit is not None
            count = len(request.row)
            feature = torch.where(request.position[:, None] % 2 == 0, edit.feature, -1)
            return edit._replace(
                feature=feature, value=request.position.float(), action_logp=torch.full((count,), -0.5),
                n_allowed=torch.full((count,), 7),
            )  # fmt: skip

    source = Valued(sae, 3, 0.4)
    config = DecodeConfig(max_new_tokens=4, stop_at_eos=False)
    decoded = decode(tiny_llama, prompts_of((5, 8)), config, source)
    trace = Trace.of(tiny_llama, decoded, config, source, rewards=[1.0, 0.0], parents=[None, 0])
    assert trace.per_row("value") == [[4.0, 5.0, 6.0, 7.0], [7.0, 8.0, 9.0, 10.0]]
    assert trace.per_row("reward") == [[None, None, None, 1.0], [None, None, None, 0.0]]
    assert trace.per_row("parent_branch") == [[None] * 4, [0] * 4]
    assert trace.per_row("kl_local") == [[None] * 4, [None] * 4]
    edits = trace.edits.to_pylist()
    assert [(e["position"], e["feature"]) for e in edits[:4]] == [(4, 3), (5, -1), (6, 3), (7, -1)]
    assert [e["operation"] for e in edits[:2]] == ["add", "none"]
    assert {(e["action_logp"], e["n_allowed"]) for e in edits} == {(-0.5, 7)}


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_trace_from_disk_replays_exactly(
    any_tiny: LanguageModel, sae: Standard, repeats: int, tmp_path: Path
) -> None:
    source = RandomFeatureSource(sae, 0.6, k=2, positions="all")
    decoded, trace = traced(any_tiny, source, repeats)
    with Run.open(tmp_path / "run", "steer", {"a": 1}) as run:
        trace.write(run)
    read = Trace.read(tmp_path / "run")
    assert read.tokens.equals(trace.tokens)
    assert read.edits.equals(trace.edits)
    assert read.decoding == CONFIG
    log = read.edit_log(source)
    for name in ("site", "row", "position", "feature", "coefficient"):
        assert torch.equal(getattr(log, name).double(), getattr(decoded.edits, name).double()), name
    report = replay_trace(any_tiny, read, source)
    assert report.exact
    assert report.n_tokens == sum(map(len, decoded.token_ids))
    assert report.matches == report.n_tokens


def test_combined_sources_keep_their_names_on_disk(tiny_llama: LanguageModel) -> None:
    sae = make_dictionary(tiny_llama)
    random = random_directions("resid_post.1", 1.5, unit="absolute")
    source = CombinedSource([StaticSource(sae, 3, 0.4), random])
    _, trace = traced(tiny_llama, source)
    rows = trace.edits.to_pylist()
    assert {(r["unit"], r["dictionary_hash"]) for r in rows} == {
        ("relative", sae.fingerprint),
        ("absolute", random.dictionary_hash),
    }
    assert all(r["feature"] == 3 for r in rows if r["unit"] == "relative")
    assert all(0 <= r["feature"] < 1024 for r in rows)
    assert replay_trace(tiny_llama, trace, source).exact
    with pytest.raises(UserError, match="give the source or dictionary that the run used"):
        trace.edit_log(StaticSource(make_dictionary(tiny_llama, n=40), 3))


def test_a_replay_reports_what_differs(tiny_llama: LanguageModel) -> None:
    sae = make_dictionary(tiny_llama)
    source = StaticSource(sae, 3, 0.4)
    _, trace = traced(tiny_llama, source)
    tokens = trace.tokens.column("token_id").to_pylist()
    tokens[2] = (tokens[2] + 1) % 100 + 6
    changed = trace.tokens.set_column(5, trace.tokens.schema.field(5), pa.array(tokens, pa.int32()))
    report = replay_trace(tiny_llama, replace(trace, tokens=changed), source)
    assert not report.exact
    first = report.mismatches[0]
    assert (first.sample, first.logged) == (0, tokens[2])
    assert first.decided != tokens[2]
    assert report.max_logp_difference > 0
    other = replace(trace, edits=trace.edits.slice(1))
    report = replay_trace(tiny_llama, other, source)
    assert report.n_edits == len(trace.edits) - 1
    assert report.max_logp_difference > 0


def a_step(what: str, edit: Edit) -> Edit:
    if what == "coefficient":
        return edit._replace(coefficient=2 * edit.coefficient)
    values = getattr(edit, what)
    return edit._replace(**{what: values + 1})


@pytest.mark.parametrize("what", ["nothing", "coefficient", "target", "site", "replacement"])
def test_edits_that_a_replay_changes_are_not_equal(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Edits of one place that differ in one thing only."""
    here, there = (tiny_llama.site(f"resid_post.{layer}") for layer in (1, 2))
    axes = DirectionTable.axes(32, [4])
    source: InterventionSource = {
        "target": StaticSource(axes, 0, 3.3, here, operation="overwrite", unit="absolute"),
        "replacement": PatchSource({here: torch.ones(32)}, positions="generated", keep_replacements=True),
    }.get(what, StaticSource({here: axes, there: axes}, {here: 0, there: -1}, 2.0, unit="absolute"))
    _, trace = traced(tiny_llama, source)
    choose = ReplaySource.choose

    def altered(self: ReplaySource, request: EditRequest) -> Edit | None:
        if what == "site":
            return choose(self, request._replace(site=there if request.site == here else here))
        edit = choose(self, request)
        return edit if edit is None or what == "nothing" else a_step(what, edit)

    monkeypatch.setattr(ReplaySource, "choose", altered)
    assert replay_trace(tiny_llama, trace, source).edits_equal == (what == "nothing")


def test_an_unsteered_call_has_a_trace_too(tiny_llama: LanguageModel) -> None:
    decoded = decode(tiny_llama, prompts_of((4, 7)), CONFIG)
    trace = Trace.of(tiny_llama, decoded, CONFIG)
    assert len(trace.edits) == 0
    assert replay_trace(tiny_llama, trace, None).exact


def test_traces_of_earlier_versions_are_read(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    source = StaticSource(make_dictionary(tiny_llama), [3, 5], [0.4, -0.2])
    _, trace = traced(tiny_llama, source)
    with Run.open(tmp_path / "run", "steer", {}) as run:
        trace.write(run)
    table = tmp_path / "run" / "edits.parquet"
    pq.write_table(pq.read_table(table).drop(["target", "replacement_hash"]), table)
    read = Trace.read(tmp_path / "run")
    assert read.edits.equals(trace.edits)
    assert replay_trace(tiny_llama, read, source).exact
    elsewhere = StaticSource(make_dictionary(tiny_llama), 3, 0.4, "resid_post.2")
    with pytest.raises(UserError, match=r"edits at resid_post.1: the given source has no such site"):
        read.edit_log(elsewhere)


def test_damaged_traces_are_refused(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run\.json"):
        Trace.read(tmp_path / "none")
    with Run.open(tmp_path / "run", "steer", {}) as run:
        with pytest.raises(UserError, match="it holds no trace"):
            Trace.read(run.path)
        decoded = decode(tiny_llama, prompts_of((4,)), CONFIG)
        Trace.of(tiny_llama, decoded, CONFIG).write(run)
    table = tmp_path / "run" / "tokens.parquet"
    whole = table.read_bytes()
    table.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not readable as Parquet"):
        Trace.read(tmp_path / "run")
    table.write_bytes(whole)
    pq.write_table(pq.read_table(table).drop(["entropy"]), table)
    with pytest.raises(UserError, match="its columns are not those of a trace"):
        Trace.read(tmp_path / "run")
