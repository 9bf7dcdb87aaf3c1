"""Several searches side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_wishes import Ground, contrast_wish, texts_wish

from trimtab import cli
from trimtab.errors import UserError
from trimtab.finding import Found, find
from trimtab.finding.comparison import compare_wishes
from trimtab.runs import Run

SMALL: dict[str, Any] = {
    "examples": (6, 6, 8), "n_neutral": (2, 3), "max_new_tokens": 4, "set_size": 1, "way": ("mean-difference",),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Found]:
    place = tmp_path_factory.mktemp("wishes")
    wishes = {
        name: contrast_wish(30, answers, seed=i)
        for i, (name, answers) in enumerate({"up": ("Y", "N"), "down": ("N", "Y"), "other": ("c", "d")}.items())
    }
    saes = list(ground.saes.values())
    return {place / name: find(ground.model, saes, wish, run=place / name, **SMALL) for name, wish in wishes.items()}


def test_ways_are_paired_by_wish(found: dict[Path, Found]) -> None:
    compared = compare_wishes(list(found))
    assert [wish.wish for wish in compared.wishes] == ["up", "down", "other"]
    assert [wish.yes for wish in compared.wishes] == [one.yes for one in found.values()]
    ways = {way.way: way for way in compared.ways}
    assert list(ways) == ["found", "random", "mean-difference"]
    for name in ("random", "mean-difference"):
        behind = [one[name].behind for one in found.values()]
        assert ways[name].difference.estimate == pytest.approx(np.mean([one.estimate for one in behind if one]))
        assert ways[name].ahead == sum(one is not None and one.low > 0 for one in behind)
        assert ways[name].behind == sum(one is not None and one.high < 0 for one in behind)
        assert ways[name].difference.n == 3
    assert ways["found"].difference.estimate == 0
    assert compared.headline().startswith(
        f"Features are found for {sum(one.yes for one in found.values())} of 3 wishes."
    )


def test_the_command(found: dict[Path, Found], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "wishes", *map(str, found), "--run", str(tmp_path / "all"), "--json"]
    assert cli.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert [wish["wish"] for wish in result["wishes"]] == ["up", "down", "other"]
    assert "ways over wishes" in (tmp_path / "all" / "report.html").read_text("utf-8")
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_runs_that_are_refused(ground: Ground, found: dict[Path, Found], tmp_path: Path) -> None:
    one, *_ = found
    with pytest.raises(UserError, match="1 runs: at least 2 are needed"):
        compare_wishes([one])
    with pytest.raises(UserError, match="2 runs: one is given twice"):
        compare_wishes([one, one])
    with Run.open(tmp_path / "rank", "rank", {}) as run:
        run.finish({})
    with pytest.raises(UserError, match="it is no finished run of find"):
        compare_wishes([one, tmp_path / "rank"])
    find(ground.model, list(ground.saes.values()), texts_wish(30), run=tmp_path / "texts", **SMALL)
    with pytest.raises(UserError, match="their units are nats of log-odds, nats per token"):
        compare_wishes([one, tmp_path / "texts"])
