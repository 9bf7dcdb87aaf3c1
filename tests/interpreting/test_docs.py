"""The examples of docs/interpreting.md about judges and autointerp run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_autointerp import WORDS, table

from trimtab.interpreting import Rating

PAGE = (Path(__file__).parents[2] / "docs" / "interpreting.md").read_text("utf-8")
SECTIONS = [PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0] for title in ("Judges of features", "Autointerp")]


def test_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/windows").mkdir(parents=True)
    table(WORDS * 2, weighted=12, random=12).write(tmp_path / "runs/windows/feature_examples.parquet")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", "".join(SECTIONS), flags=re.DOTALL):
        exec(example.replace("features=40", "features=4"), names)
    assert isinstance(names["rating"], Rating)
    assert names["rating"].concept > 0.5
