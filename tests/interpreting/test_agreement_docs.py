"""What docs/interpreting.md shows of rank agreement comes out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.interpreting import RankAgreement, ScoredSAE
from trimtab.interpreting.scored_sae import SELECTED

PAGE = (Path(__file__).parents[2] / "docs" / "interpreting.md").read_text("utf-8")
SECTION = PAGE.partition("## Do the rankings agree?")[2].partition("\n## ")[0]


def test_the_example_gives_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    (example,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
    exec(example, names)
    found = names["found"]
    assert isinstance(found, RankAgreement)
    assert "Kendall's τ_b with 95% intervals" in " ".join(capsys.readouterr().out.split())
    shown = {
        c: f"| {c.after:+.2f} | {c.gain:+.2f} |".replace("-", "−").replace("+0.00 [", "0.00 [") for c in found.gains
    }
    rows = re.findall(r"^\| (?:measured|amounts|factors).*?(\|.*\|)$", SECTION, flags=re.MULTILINE)
    assert rows == list(shown.values())


def test_the_columns_are_those_of_a_table() -> None:
    table = SECTION.partition("| column |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    fields = set(ScoredSAE.__dataclass_fields__) - {"selected"}
    assert named == fields | {f"{SELECTED}NAME"}
