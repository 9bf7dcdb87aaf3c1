"""The demo's report shows what the run holds, whichever way its verdict went."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UserError
from trimtab.report import demo_page, write_demo_report


def interval(estimate: float, half: float = 0.02) -> dict[str, Any]:
    return {
        "estimate": estimate,
        "low": estimate - half,
        "high": estimate + half,
        "n": 48,
        "level": 0.95,
        "method": "bootstrap",
    }


def arm(name: str, score: float | None) -> dict[str, Any]:
    given = None if score is None else interval(score)
    return {
        "name": name,
        "score": given,
        "score_in_band": given,
        "rate": given,
        "in_band": interval(0.9),
        "nll": interval(2.5),
        "repetition": interval(0.01),
        "relative_dose": 0.0 if score is None else 0.4,
        "n_edits": 0 if score is None else 2304,
        "draws": [0.01, 0.03] if name == "random" else [],
    }


def feature(number: int) -> dict[str, Any]:
    return {
        "feature": number,
        "score": -3.5,
        "rank": 5000,
        "firing_rate": 0.01,
        "max_activation": 40.0,
        "top_tokens": [" sea", "\n", "<b>"],
        "effect": 0.25,
    }


@pytest.fixture
def record() -> dict[str, Any]:
    text = {"tokens": [" the", " <sea>"], "nll": 2.0, "fired": [False, True], "feature": 11}
    cell = {"utility": 0.1, "effect": 0.2, "in_band": 0.7, "n_rows": 24, "size": 4, "dose": 0.4}
    down = {**cell, "criterion": "delta-confidence", "direction": "down"}
    output = {**cell, "criterion": "output-score", "direction": "up"}
    steered = {"delta-confidence": 0.31, "output-score": 0.2, "random": 0.02, "most-active": 0.05}
    return {
        "schema": 1,
        "command": "demo",
        "status": "done",
        "config": {"temperature": 0.7, "top_p": 0.95, "seed": 0, "replicates": 2},
        "versions": {"trimtab": "0.1.0", "torch": "2.13"},
        "updated": "2026-01-02T03:04:05Z",
        "hashes": {"model": "abc", "dictionary": "def"},
        "resumptions": [],
        "splits": {},
        "test_split_openings": [{"split": "held_out", "time": "2026-01-02T03:00:00Z"}],
        "results": {
            "model": "a-model",
            "sae": "default",
            "site": "resid_post.15",
            "n_features": 5120,
            "n_ranked": 5100,
            "n_prompts": 48,
            "n_tokens": 24,
            "dose": 0.4,
            "band": {"low": 1.5, "high": 3.5},
            "verdict": {"yes": True, "text": "Yes: it does <so>."},
            "arms": [arm("unsteered", None), *(arm(name, score) for name, score in steered.items())],
            "differences": [{"arm": n, "interval": interval(0.1), "in_band": interval(0.05)} for n in ("random",)],
            "ranking": {"criterion": "delta-confidence", "rank": [0, 2500, 5099], "score": [4.0, 0.1, -4.0]},
            "grid": [down, output],
            "chosen": {"delta-confidence": down, "output-score": output},
            "features": {"delta-confidence": [feature(11)], "output-score": [feature(12)]},
            "examples": {
                "rule": "the first",
                "rows": [
                    {
                        "prompt": "Once",
                        "unsteered": {"tokens": [" more"], "nll": 2.0},
                        **{name: text for name in ("delta-confidence", "output-score", "random-1")},
                    }
                ],
            },
        },
    }


def test_numbers_features_and_texts_are_on_the_page(record: dict[str, Any]):
    page = demo_page(record).render()
    for shown in ("+31.0", "[+29.0, +33.0]", "2,304", "0.400", "resid_post.15", "5,100", "abc", "2026-01-02T03:00:00Z"):
        assert shown in page
    assert "<mark> &lt;sea&gt;</mark>" in page  # fired there
    assert "<mark> the</mark>" not in page  # not there
    assert "Yes: it does &lt;so&gt;." in page
    assert 'class="verdict yes"' in page


def test_no_is_shown_as_no(record: dict[str, Any]):
    record["results"]["verdict"] = {"yes": False, "text": "No: it does not."}
    page = demo_page(record).render()
    assert 'class="verdict no"' in page
    assert "No: it does not." in page


def test_report_is_written_beside_the_run(record: dict[str, Any], tmp_path: Path):
    (tmp_path / "run.json").write_text(json.dumps(record))
    path = write_demo_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == demo_page(record).render()


@pytest.mark.parametrize("change", [{"results": None}, {"command": "rank"}])
def test_unfinished_or_other_run_says_so(record: dict[str, Any], tmp_path: Path, change: dict[str, Any]):
    (tmp_path / "run.json").write_text(json.dumps({**copy.deepcopy(record), **change}))
    with pytest.raises(UserError, match=r"it is not a finished demo; run `trimtab demo` first"):
        write_demo_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
