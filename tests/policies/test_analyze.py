"""The command on a small training: its files, its report, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from first_letter import FirstLetter
from planted_readout import planted_sae
from rich.console import Console

from trimtab import cli
from trimtab.dictionaries import Standard, save_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.policies.analyses import command
from trimtab.policies.analyses.command import PARTS, AnalyzeConfig, analyze, analyze_policy
from trimtab.policies.config import PolicyConfig
from trimtab.policies.setup import Setup
from trimtab.policies.train import CHECKPOINTS, fit, load_policy
from trimtab.policies.trained import TrainedRun
from trimtab.report import write_report
from trimtab.runs import Run, read_record
from trimtab.stats import Interval


@pytest.fixture
def trained(tiny_llama: LanguageModel, sae: Standard, tmp_path: Path) -> Iterator[TrainedRun]:
    config = PolicyConfig(
        task="first-letter", run=tmp_path / "run", mask="accumulated", dose=2.0, max_new_tokens=3, iterations=2,
        items_per_iteration=8, samples=2, hidden=(8,), validate_every=1, checkpoint_every=1,
        initial_no_edit=0.0,
    )  # fmt: skip
    setup = Setup.with_parts(config, tiny_llama, sae, FirstLetter.load())
    with Run.open(tmp_path / "run", "policy train", config) as run:
        fit(setup, run)
        run.finish({})
        yield TrainedRun(run=run, setup=setup, policy=load_policy(setup, run.path))


def small(path: Path, **settings: object) -> AnalyzeConfig:
    text = path.parent / "text.txt"
    if not text.exists():
        text.write_text("the cat and the dog ran into the inn.\n\n" * 60)
    values: dict[str, object] = {
        "run": (path,), "items": 6, "branch_items": 2, "branch_tokens": 2, "branch_candidates": 3, "branch_draws": 2,
        "layer_items": 4, "dose_factor": (0.5, 1.0), "text": (str(text),), "text_rows": 300, "live_sample": 16,
        "ablated": 2,
    }  # fmt: skip
    return AnalyzeConfig(**(values | settings))  # pyright: ignore[reportArgumentType]


def test_all_parts_are_written_and_shown(trained: TrainedRun) -> None:
    found = analyze([trained], small(trained.run.path))
    place = trained.run.path / "analysis"
    written = json.loads((place / "analysis.json").read_text())
    assert written == json.loads(json.dumps(found.to_json()))
    assert (written["items"], written["split"], written["task"]) == (6, "test", "first-letter")
    tables = {path.stem: pq.read_table(path) for path in place.glob("*.parquet")}
    assert found.branch_points is not None
    assert tables["branch_points"].num_rows == len(found.branch_points.tokens)
    assert tables["branch_forks"].num_rows == len(found.branch_points.forks)
    assert found.ledger is not None
    assert sum(tables["ledger"]["uses"].to_pylist()) + found.ledger.no_edit == found.ledger.decisions
    assert found.critic is not None
    assert sum(found.critic.counts.values()) == 6
    assert {"group", "step", "n", "mean", "sd"} == set(tables["critic_curve"].column_names)
    assert tables["layer_doses"]["dose"].to_pylist() == [1.0, 2.0]
    assert {"critic", "critic_low", "critic_high"} <= set(tables["critic_auc"].column_names)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(found.render())
    text = console.export_text()
    for words in ("branch points", "critic: AUC", "layers: validation reward", "ledger:"):
        assert words in text
    openings = trained.run.record_dict["test_split_openings"]
    assert [opening["n"] for opening in openings] == [6]


def test_one_part_alone_and_again_gives_the_same(trained: TrainedRun) -> None:
    config = small(trained.run.path, part=("branch-points",), split="validation")
    first, again = analyze([trained], config), analyze([trained], config)
    assert first.critic is first.ledger is None
    assert first.layers == ()
    assert first.branch_points == again.branch_points
    assert first.warnings == again.warnings


def test_several_runs_are_compared_as_layers(trained: TrainedRun) -> None:
    found = analyze([trained, trained], small(trained.run.path, part=("layers",)))
    assert [layer.site for layer in found.layers] == ["resid_post.1"] * 2
    assert trained.run.record_dict["test_split_openings"] == []


def read(place: Path) -> dict[str, Any]:
    return json.loads((place / "analysis.json").read_text())


def tables(place: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: pq.read_table(path).to_pylist() for path in place.glob("*.parquet")}


def test_results_are_read_again_from_disk_and_reported(trained: TrainedRun) -> None:
    found = analyze([trained], small(trained.run.path))
    trained.run.close()
    place = trained.run.path / "analysis"
    again, rows = read(place), tables(place)
    assert again["checkpoint"] == "step-000000002"
    assert [t["item"] for t in again["branch_points"]["tokens"]] == [row["item"] for row in rows["branch_points"]]
    assert again["critic"]["counts"] == found.critic.counts  # pyright: ignore[reportOptionalMemberAccess]
    curve = [(row["group"], row["step"], row["mean"]) for row in rows["critic_curve"]]
    assert curve == [(p["group"], p["step"], p["mean"]) for p in again["critic"]["curve"]]
    uses = {row["feature"]: row["uses"] for row in rows["ledger"]}
    assert uses == {entry["feature"]: entry["uses"] for entry in again["ledger"]["entries"]}
    counted = {feature: 0 for feature in uses}
    for row in rows["ledger_tokens"]:
        counted[row["feature"]] += row["count"]
    assert all(0 < counted[feature] <= uses[feature] for feature in uses)
    rewards = [Interval.from_dict(dose["reward"]).estimate for dose in again["layers"][0]["doses"]]
    assert rewards == [row["reward"] for row in rows["layer_doses"]]
    page = write_report(trained.run.path).read_text()
    for said in ("Branch points were not looked for", "The critic was not judged", "There is no ledger"):
        assert said not in page
    for feature in uses:
        assert str(feature) in page


def test_a_second_call_overwrites_what_it_makes_anew_and_keeps_the_rest(trained: TrainedRun) -> None:
    place = trained.run.path / "analysis"
    analyze([trained], small(trained.run.path))
    first, rows = read(place), tables(place)
    analyze([trained], small(trained.run.path))
    assert {**read(place), "seconds": 0, "warnings": []} == {**first, "seconds": 0, "warnings": []}
    assert repr(tables(place)) == repr(rows)
    assert any("was opened before (1× in " in warning for warning in read(place)["warnings"])
    analyze([trained], small(trained.run.path, part=("ledger",), contexts=0, seed=7))
    joined, now = read(place), tables(place)
    for part in ("branch_points", "critic", "layers"):
        assert joined[part] == first[part]
    assert {name for name in rows if name != "ledger_contexts"} == set(now)
    assert all(not entry["contexts"] for entry in joined["ledger"]["entries"])
    assert any("was opened before (1× in " in warning for warning in joined["warnings"])


def test_results_of_other_items_are_not_mixed(trained: TrainedRun) -> None:
    place = trained.run.path / "analysis"
    analyze([trained], small(trained.run.path, part=("critic", "ledger")))
    assert "ledger" in tables(place)
    (place / ".trimtab-partial-left.parquet").write_bytes(b"torn")
    analyze([trained], small(trained.run.path, part=("critic",), items=5))
    assert read(place)["ledger"] is None
    assert set(tables(place)) == {"critic_curve", "critic_auc"}
    assert not list(place.glob(".trimtab*"))
    page = write_report(trained.run.path).read_text()
    assert "There is no ledger" in page


def test_an_analysis_that_is_stopped_while_it_writes_is_made_again(
    trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = trained.run.path / "analysis"
    config = small(trained.run.path, part=("critic", "ledger"), split="validation")
    analyze([trained], config)
    whole = read(place)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "write_table", stop)
        with pytest.raises(KeyboardInterrupt):
            analyze([trained], config)
        with pytest.raises(KeyboardInterrupt):
            analyze([trained], small(trained.run.path, part=("critic",), split="train"))
    assert not (place / "analysis.json").exists()
    write_report(trained.run.path)
    analyze([trained], config)
    assert {**read(place), "seconds": 0} == {**whole, "seconds": 0}


def test_the_command_analyses_a_run_by_its_directory_alone(
    tiny_llama: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    plain = planted_sae(tiny_llama, "resid_post.1")
    info = replace(plain.info, model=str(tmp_path / "model"))
    save_dictionary(Standard(plain.W_enc, plain.b_enc, plain.W_dec, plain.b_dec, info=info), tmp_path / "sae")
    run = tmp_path / "run"
    words = [
        "policy", "train", "--model", tmp_path / "model", "--sae", tmp_path / "sae", "--task",
        "first_letter:FirstLetter", "--run", run, "--options-only", "--iterations", 1, "--items-per-iteration", 4,
        "--hidden", 8, "--validate-every", 1,
    ]  # fmt: skip
    assert cli.main([*map(str, words)]) == 0
    before = read_record(run)
    capsys.readouterr()
    for parts in (["critic"], ["ledger", "critic"]):
        assert cli.main(["policy", "analyze", str(run), "--part", *parts, "--items", "6", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == read(run / "analysis")
    after = read_record(run)
    assert (after["status"], after["results"]) == ("done", before["results"])
    assert len(after["test_split_openings"]) == 2
    assert cli.main(["report", str(run)]) == 0
    assert "There is no ledger" not in (run / "report.html").read_text()


def test_a_split_that_is_not_there(trained: TrainedRun) -> None:
    with pytest.raises(UserError, match=r"split 'tset': task first-letter has train, validation, test and all"):
        analyze([trained], small(trained.run.path, split="tset"))


def test_a_run_of_another_command_and_one_that_is_not_there(tmp_path: Path) -> None:
    with Run.open(tmp_path / "other", "rank", {"model": "m"}):
        pass
    with pytest.raises(UserError, match="it belongs to `rank`, not `policy train`"):
        analyze_policy(small(tmp_path / "other"))
    with pytest.raises(UserError, match=r"there is no run\.json"):
        analyze_policy(small(tmp_path / "nowhere"))


def test_a_run_without_a_checkpoint(trained: TrainedRun) -> None:
    path = trained.run.path
    shutil.rmtree(path / CHECKPOINTS)
    with pytest.raises(UserError, match="it holds no checkpoint"):
        analyze_policy(small(path))


def test_runs_of_different_tasks_are_not_compared(trained: TrainedRun, tmp_path: Path) -> None:
    other = tmp_path / "copy"
    shutil.copytree(trained.run.path, other)
    record = json.loads((other / "run.json").read_text())
    record["config"]["task"] = "ioi"
    (other / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="its task is ioi, not first-letter"):
        analyze_policy(small(trained.run.path, run=(trained.run.path, other)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"run": ()}, "there is no run to analyse"),
        ({"part": ("everything",)}, f"it is one of {', '.join(PARTS)}"),
        ({"branch_candidates": 0}, "branch_candidates 0: it must be at least 1"),
        ({"ablated": -1}, "ablated -1: it must be at least 0"),
        ({"false_discovery_rate": 1.0}, "must be between 0 and 1"),
        ({"dose_factor": (0.0,)}, "factors are above 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        small(tmp_path, **settings)
    assert said in error.value.line
