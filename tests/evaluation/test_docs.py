"""The examples of docs/circuits.md and docs/supervised.md run, one after the other, on a model built by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.dictionaries import DictionaryInfo, Standard
from trimtab.lm import LanguageModel


def run_page(name: str, model: LanguageModel, **given: Any) -> dict[str, Any]:
    """What the examples of a page define."""
    page = (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8")
    known: dict[str, Any] = {"model": model, **given}
    page = page.replace("ioi.prompts(1000)", "ioi.prompts(200)")  # this model knows ten names
    page = page.replace('ioi.prompts(1000, "test")', 'ioi.prompts(200, "test")')
    page = page.replace('"validation"))', '"validation"), epochs=2)').replace(
        "more, {places", "more, epochs=2, test_activations={places"
    )
    page = page.replace("occlusion_toy())", "occlusion_toy((1.0,), n_values=8, heldout=20, epochs=2, seeds=(0,)))")
    page = page.replace("splitting_toy())", "splitting_toy((7.0,), rows=1000))")  # the page's takes half a minute
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(code, name, "exec"), known)
    return known


def test_circuits(built: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    known = run_page("circuits.md", built)
    assert [tuple(head) for head in known["effects"][0].nonzero().tolist()] == [(0, 1)]
    assert "2 heads of built bring about 1.00" in capsys.readouterr().out


def test_supervised(
    built: LanguageModel, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name mover copies IO, so that its code alone rebuilds and edits what it gives.

    The SAE has a feature for each coordinate of its output, which are the names.
    """
    monkeypatch.chdir(tmp_path)
    eye, zero = torch.eye(16), torch.zeros(16)
    sae = Standard(eye, zero - 0.05, eye, zero, info=DictionaryInfo(architecture="standard"))
    known = run_page("supervised.md", built, sae=sae)
    said = capsys.readouterr().out
    (place,) = known["locations"]
    assert place.site.layer == 1
    assert "codes lacks ()" in said
    read = known["loaded"].dictionaries["codes"][place]
    assert read.info.metadata["read_accuracy"]["IO"]["estimate"] == 1
    x, rows = known["heldout"][place], known["factors"].rows(known["test"])
    assert torch.equal(read.read(x)[:, 0], rows[:, 0])
    found = known["approximation"](known["prompts"], known["means"], known["rebuilt"])
    assert found.sufficiency.estimate == pytest.approx(1, abs=0.02)
    assert found.necessity is not None
    assert found.necessity.estimate == pytest.approx(1, abs=0.05)
    assert said.count("EditSuccess(success=Interval(estimate=1.0") == 2  # by codes and by the SAE's features
    assert "lower loss than the ideal two at 1 of 1 λ" in said
    assert "(8 each) that have a feature with an F1 from 0.9 and 0.3, L0 2: norms 1 to 1: " in said
    assert known["said"].both_causal is False  # its name mover copies IO alone
    assert "features of a value of Pos at attn_z.1.2 at END" in said
    assert sum(meaning.f1 > 0.99 and meaning.predicates[0].startswith("IO=") for meaning in known["meanings"]) >= 8
