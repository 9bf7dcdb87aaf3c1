"""Runs side by side: their numbers are those of their files, settings that differ are columns, misuse is named."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from first_letter import FirstLetter
from planted_readout import planted_sae
from rich.console import Console

from trimtab import cli
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.policies.compare import SETTINGS, CompareConfig, RunComparison, compare_runs
from trimtab.policies.config import NOT_THE_RESULT, PolicyConfig
from trimtab.policies.evaluate import EvaluateConfig, evaluate_trained
from trimtab.policies.setup import Setup
from trimtab.policies.train import fit, load_policy
from trimtab.policies.trained import TrainedRun, read_policy_config
from trimtab.runs import Run

MASKS = ("none", "current")


@pytest.fixture(scope="module")
def trained(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under each of two masks, the first with its headroom measured."""
    place = tmp_path_factory.mktemp("runs")
    sae = planted_sae(tiny_llama, "resid_post.1")
    for mask in MASKS:
        config = PolicyConfig(
            task="first-letter", run=place / mask, mask=mask, dose=2.0, options_only=True, iterations=2,
            items_per_iteration=6, samples=2, hidden=(8,), validate_every=1, headroom_items=4 if mask == "none" else 0,
        )  # fmt: skip
        with Run.open(place / mask, "policy train", config) as run:
            done = fit(Setup.with_parts(config, tiny_llama, sae, FirstLetter.load()), run)
            run.finish({name: value for name, value in vars(done).items() if name != "policy"})
    return place


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may add to."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def compare(*paths: Path) -> RunComparison:
    return compare_runs(CompareConfig(run=paths))


def shown(comparison: RunComparison, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison.render())
    return console.export_text()


def evaluate_run(tiny: LanguageModel, path: Path, *, mask: str, home: Path | None = None) -> None:
    """The run's untrained policy on test items, without controls."""
    config = read_policy_config(path)
    setup = Setup.with_parts(config, tiny, planted_sae(tiny, "resid_post.1"), FirstLetter.load())
    assert config.mask == mask
    settings = EvaluateConfig(policy=(path,), control=(), equal_kl=False, items=7, trace=False)
    with Run.open(path, "policy train", config, ignore_fields=NOT_THE_RESULT) as run:
        entry = TrainedRun(run=run, setup=setup, policy=load_policy(setup, run.path))
        if home is None:
            evaluate_trained([entry], settings)
        else:
            with Run.open(home, "policy evaluate", {"policy": str(path)}) as out:
                evaluate_trained([entry], settings, home=out)
                out.finish({})


def test_numbers_are_those_of_the_runs(runs: Path) -> None:
    found = compare(runs / "none", runs / "current")
    assert [run.settings["mask"] for run in found.runs] == list(MASKS)
    for run, mask in zip(found.runs, MASKS, strict=True):
        lines = [json.loads(line) for line in (runs / mask / "metrics.jsonl").open()]
        results = json.loads((runs / mask / "run.json").read_text())["results"]
        (kept,) = [n for n in lines if "validation/reward" in n and n["step"] == results["best_iteration"]]
        assert run.checkpoint == results["best_iteration"]
        assert run.effective_features == pytest.approx(np.exp(kept["validation/entropy"]))
        assert (run.allowed, run.no_edit_share) == (kept["validation/allowed"], kept["validation/no_edit_share"])
        assert (run.split, run.reward) == ("validation", results["best_validation_reward"])
        assert (run.unsteered, run.seconds) == (results["unsteered_validation_reward"], results["seconds"])
        assert (run.interval, run.kl, run.iterations, run.status) == (None, None, 2, "done")
    assert found.runs[0].allowed == 32
    (line,) = json.loads((runs / "none/headroom.json").read_text())["lines"]
    inside = found.runs[0].headroom
    assert inside is not None
    assert (inside.static, inside.ceiling) == (line["static"]["estimate"], line["ceiling"]["estimate"])
    assert (inside.split, inside.items, inside.over_static) == ("validation", 4, line["over_static"])
    assert found.runs[1].headroom is None
    assert any("no headroom inside the mask: current" in warning for warning in found.warnings)
    assert any("rewards are on validation" in warning for warning in found.warnings)


def logged(**changes: float) -> list[dict[str, float]]:
    """Four iterations, validated at 0, 2 and 4; each number of a rollout or a validation names its iteration."""
    rewards = {0: 0.1, 2: 0.3, 4: 0.2} | {int(name[1:]): value for name, value in changes.items()}
    lines: list[dict[str, float]] = []
    for step in range(5):
        if step:
            rolled = {"entropy": 0.0, "effective_features": step + 0.5, "allowed": 10, "kl_unsteered": step + 0.25}
            lines.append({"step": step, **{f"policy/{name}": value for name, value in rolled.items()}})
        if step in rewards:
            lines.append({"step": step, "validation/reward": rewards[step], "validation/effective_features": step})
    return lines


def only_rollouts(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """As logged by a version that logged no choices at validation."""
    return [{name: value for name, value in line.items() if name != "validation/effective_features"} for line in lines]


@pytest.mark.parametrize(
    ("lines", "checkpoint", "effective", "kl"),
    [
        (logged(), 2, 2, 3.25),
        (logged(_0=0.3), 0, 0, 1.25),
        (logged(_4=0.4), 4, 4, None),
        (only_rollouts(logged()), 2, 3.5, 3.25),
        (only_rollouts(logged(_4=0.4)), 4, None, None),
        ([], None, None, None),
    ],
    ids=["best in the middle", "a tie with the untrained", "best at last", "older", "older, best at last", "nothing"],
)
def test_choices_are_those_of_the_policy_that_was_kept(
    runs: Path, lines: list[dict[str, float]], checkpoint: int | None, effective: float | None, kl: float | None
) -> None:
    """Rollouts of an iteration are made before its update: the kept policy's are those of the next."""
    (runs / "none/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison = compare(runs / "none")
    (run,) = comparison.runs
    assert (run.checkpoint, run.effective_features, run.kl) == (checkpoint, effective, kl)
    text = shown(comparison)
    if checkpoint is not None:
        assert f"{checkpoint} of 4" in text
    if effective is not None:
        assert f" {effective:.1f}" in text


def test_the_reward_of_an_evaluation_stands_for_that_of_validation(tiny_llama: LanguageModel, runs: Path) -> None:
    evaluate_run(tiny_llama, runs / "none", mask="none")
    evaluate_run(tiny_llama, runs / "current", mask="current", home=runs / "out")
    alone = compare(runs / "none", runs / "current")
    assert [run.split for run in alone.runs] == ["test[:7]", "validation"]
    assert any("rewards are on different items: test[:7], validation" in warning for warning in alone.warnings)
    both = compare(runs / "none", runs / "out", runs / "current")
    assert [Path(run.run).name for run in both.runs] == list(MASKS)
    assert not any("different items" in warning for warning in both.warnings)
    for run, place in zip(both.runs, ("none", "out"), strict=True):
        rows = pq.read_table(runs / place / "evaluation_items.parquet").to_pylist()
        mine = [row for row in rows if row["arm"] == "policy"]
        assert len(mine) == run.items == 7
        assert run.reward == pytest.approx(np.mean([row["reward"] for row in mine]))
        assert run.kl == pytest.approx(np.mean([row["kl"] for row in mine]))
        assert run.unsteered == pytest.approx(np.mean([r["reward"] for r in rows if r["arm"] == "unsteered"]))
        assert run.interval is not None
        assert run.interval.low <= run.reward <= run.interval.high
        assert run.interval.n == 7


def test_what_differs_is_a_column_and_what_is_shared_the_title(runs: Path) -> None:
    text = shown(compare(runs / "none", runs / "current"))
    title, *_ = text.splitlines()
    assert "first-letter: " in title
    assert "dose 2.0" in title
    assert "mask" not in title
    assert "current" in text
    one = shown(compare(runs / "none"))
    assert "mask none" in one.splitlines()[0]


def test_sites_that_differ_stay_whole_in_a_narrow_terminal(runs: Path) -> None:
    for mask, site in zip(MASKS, ("resid_post.15", "resid_post.22"), strict=True):
        record = json.loads((runs / mask / "run.json").read_text())
        record["config"]["site"] = site
        (runs / mask / "run.json").write_text(json.dumps(record))
    text = shown(compare(runs / "none", runs / "current"), width=80)
    assert all(text.count(whole) == 1 for whole in ("resid_post.15", "resid_post.22"))


def test_the_command_prints_json_and_loads_no_torch(runs: Path) -> None:
    code = (
        "import sys; from trimtab.cli import main; status = main(sys.argv[1:]); "
        "print(status, 'torch' in sys.modules, file=sys.stderr)"
    )
    words = ["policy", "compare", str(runs / "none"), str(runs / "current"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.stderr.split() == ["0", "False"]
    printed = json.loads(done.stdout)
    assert printed == json.loads(json.dumps(compare(runs / "none", runs / "current").to_json()))
    assert set(printed["runs"][0]["settings"]) == set(SETTINGS)


def test_a_run_that_is_not_finished_is_shown_and_said(runs: Path) -> None:
    record = json.loads((runs / "current/run.json").read_text())
    (runs / "current/run.json").write_text(json.dumps(record | {"status": "running", "results": None}))
    found = compare(runs / "none", runs / "current")
    assert found.runs[1].seconds is None
    assert found.runs[1].reward is not None
    assert any("not finished: current" in warning for warning in found.warnings)


def test_an_evaluation_of_another_run_of_that_name_does_not_count(tiny_llama: LanguageModel, runs: Path) -> None:
    evaluate_run(tiny_llama, runs / "none", mask="none")
    shutil.copytree(runs / "current", runs / "other" / "none")
    assert [run.split for run in compare(runs / "none", runs / "other/none").runs] == ["test[:7]", "validation"]


def test_runs_of_different_tasks_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((runs / "current/run.json").read_text())
    record["config"]["task"] = "ioi"
    (runs / "current/run.json").write_text(json.dumps(record))
    assert cli.main(["policy", "compare", str(runs / "none"), str(runs / "current")]) == 2
    assert "its task is ioi, not first-letter; compare the runs of one task" in capsys.readouterr().err


def test_mistakes_are_named(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="policy compare: there is no run to compare"):
        CompareConfig()
    with pytest.raises(UserError, match=r"there is no run\.json"):
        compare(tmp_path / "nowhere")
    with Run.open(tmp_path / "other", "rank", {"model": "m"}):
        pass
    with pytest.raises(UserError, match="it belongs to `rank`, not `policy train`"):
        compare(runs / "none", tmp_path / "other")
    with Run.open(tmp_path / "out", "policy evaluate", {"policy": []}):
        pass
    with pytest.raises(UserError, match="none of the runs is of `policy train`"):
        compare(tmp_path / "out")
    (runs / "none/headroom.json").write_text("{")
    with pytest.raises(UserError, match=r"headroom\.json: it is not JSON"):
        compare(runs / "none")
    (runs / "current/evaluation.json").write_text(
        json.dumps({"runs": ["current"], "seeds": [0], "result": {"task": "t", "split": "test", "arms": [
            {"label": "policy", "by_seed": [0.5]}]}})
    )  # fmt: skip
    (runs / "current/evaluation_items.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="it is not readable as Parquet"):
        compare(runs / "current")


def test_other_options_and_judges_are_shown_and_warned_of(runs: Path) -> None:
    warning = "rewards do not mean the same: the runs differ in options of the task or in the judge"
    both = [runs / mask for mask in MASKS]
    assert warning not in compare(*both).warnings
    record = json.loads((both[1] / "run.json").read_text())
    record["config"] |= {"task_option": ["shots=2", "subjects=a"], "judge": "classifier:x"}
    (both[1] / "run.json").write_text(json.dumps(record))
    found = compare(*both)
    assert warning in found.warnings
    assert [run.settings["task_option"] for run in found.runs] == [None, "shots=2 subjects=a"]
    assert "classifier:x" in shown(found)
