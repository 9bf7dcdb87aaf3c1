"""Each command's real result beside its page: what it printed stands there, and what it did not is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from outline import Outline
from real_runs import Made

from trimtab import cli
from trimtab.errors import UserError
from trimtab.report import write_report
from trimtab.runs import Run, read_record

Make = Callable[[str], Made]


def text(value: Any, form: str = ".3f") -> str:
    """A number or an interval in words, by itself."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        bounds = "" if value["low"] is None else f" [{value['low']:{form}}, {value['high']:{form}}]"
        return f"{value['estimate']:{form}}{bounds}".replace("-", "−")
    return format(value, form).replace("-", "−")


def page(path: Path) -> Outline:
    assert write_report(path) == path / "report.html"
    return Outline.of(path / "report.html")


def test_a_bank_stands_on_its_page(made: Make) -> None:
    path, printed = made("train")
    found = page(path)
    for member in printed["members"]:
        row = found.row(member["name"])
        assert row[1:5] == [
            text(member["explained_variance"], ".4f"), text(member["l0"], ".2f"), text(member["l0_target"], "g"),
            text(member["dead_share"], ".1%"),
        ]  # fmt: skip
        assert row[6:8] == [f"{member['steps']:,}", f"{member['rows']:,}"]
    best = max(printed["members"], key=lambda member: member["explained_variance"])
    assert f"Explained variance {best['explained_variance']:.4f} at L0 {best['l0']:.2f} for the best" in found.words
    missed = [member["name"] for member in printed["members"] if not member["l0_reached_target"]]
    assert (f"Not at the L0 asked for: {', '.join(missed)}." in found.words) == bool(missed)
    assert {"topk, resid_post.1", "gated, resid_post.1"} <= set(found.drawn)


def test_one_sae_stands_on_its_page_with_its_training(made: Make) -> None:
    path, printed = made("train-one")
    found = page(path)
    assert found.row("train-one")[1:3] == [text(printed["explained_variance"], ".4f"), text(printed["l0"], ".2f")]
    assert f"at L0 {printed['l0']:.2f}." in found.words
    for curve in ("explained variance", "L0", "loss", "dead features"):
        assert f"{curve.capitalize()} over the training." in found.words


def test_rankings_stand_on_their_page_with_the_meaning_of_features(made: Make) -> None:
    path, printed = made("rank")
    found = page(path)
    for name, ends in printed["criteria"].items():
        best = ends["top"][0]
        rows = [row for row in found.rows if row[0] == str(best["feature"]) and row[2] == text(best["score"], ".4g")]
        assert rows, name
        assert re.sub(r"[∅␣⏎\s]", "", rows[0][1]) == re.sub(r"\s", "", "".join(best["top_tokens"]))
    table = pq.read_table(path / "features.parquet").to_pylist()
    last = max((row for row in table if row["criterion"].startswith("delta")), key=lambda row: row["rank"])
    assert any(row[:1] == [str(last["feature"])] and row[2] == text(last["score"], ".4g") for row in found.rows)


def test_steered_texts_stand_on_their_page(made: Make) -> None:
    path, printed = made("steer")
    found = page(path)
    for arm in printed["arms"]:
        done = arm["realised"]
        measured = [arm[name] for name in ("kl_local", "kl_total", "unsteered_nll")]
        numbers = [f"{done['n_edits']:,}", *map(text, (done["relative"], *measured))]
        assert found.row(arm["name"])[1:] == numbers
        for one in arm["continuations"]:
            assert " ".join(one["text"].split()) in found.words
    assert re.match(r"What does steering with feature 3 \(.+?\), 5 \(.+?\) write\?", found.words)
    assert read_record(path)["features"].keys() == {"3", "5"}


def test_core_metrics_stand_on_their_page(made: Make) -> None:
    path, printed = made("core")
    found = page(path)
    rows = {row[0]: row[1] for row in found.rows if len(row) == 2}
    assert rows["explained variance"] == text(printed["metrics"]["explained_variance"], ".4f")
    assert rows["L0 (features per token)"] == text(printed["metrics"]["l0"], ".2f")
    assert len(rows) == len(printed["metrics"]) + 1  # and its head
    assert f"{printed['tokens']:,} tokens of {printed['documents']:,} documents" in found.words
    assert f"{printed['density']['never']:,} never did" in found.words


def test_the_same_run_gives_the_same_file(whole: Path) -> None:
    first = write_report(whole).read_bytes()
    assert write_report(whole).read_bytes() == first


def test_the_command_line_writes_the_page_of_any_run(
    made: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made("steer").path
    assert cli.main(["report", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(path / "report.html")}
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "there is no run.json" in capsys.readouterr().err


def test_runs_without_a_page_and_those_that_go_on(tmp_path: Path) -> None:
    with Run.open(tmp_path / "other", "harvest", {}) as run:
        run.finish({})
    with pytest.raises(UserError, match="it belongs to `harvest`, which has no page; name a run of demo, train, rank"):
        write_report(tmp_path / "other")
    for command in ("demo", "rank", "steer", "train", "evaluate core"):
        with Run.open(tmp_path / command, command, {}):
            pass
        with pytest.raises(UserError, match="it has not finished; run the same command again"):
            write_report(tmp_path / command)
    assert not (tmp_path / "demo/report.html").exists()
    assert read_record(tmp_path / "demo")["command"] == "demo"
