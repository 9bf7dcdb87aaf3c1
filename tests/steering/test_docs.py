"""The examples of docs/steering.md run, one after the other, on each kind of model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.dictionaries import Standard
from trimtab.lm import Decoded, LanguageModel, decode
from trimtab.steering import OPERATIONS, ReplayReport, SteerResult

PAGE = Path(__file__).parents[2] / "docs" / "steering.md"


def test_the_examples(any_tiny: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trimtab.steering.operations.OPERATIONS", dict(OPERATIONS))
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {"model": any_tiny, "sae": sae}
    for example in examples:
        exec(example, names)
    for name in ("result", "raised"):
        found = names[name]
        assert isinstance(found, SteerResult)
    plain = decode(any_tiny, names["prompts"], names["config"])  # type: ignore[arg-type]
    for name, n_edits in (("steered", 2 * 2 * 8), ("alternating", 2 * 8), ("patched", 1)):
        found = names[name]
        assert isinstance(found, Decoded)
        assert len(found.edits) == n_edits
    assert names["steered"].token_logp != plain.token_logp  # type: ignore[attr-defined]
    report = names["report"]
    assert isinstance(report, ReplayReport)
    assert report.n_edits == 16
    assert (len(names["first"].token_ids), len(names["second"].token_ids)) == (8, 3)  # type: ignore[attr-defined]
