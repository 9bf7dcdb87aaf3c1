"""The examples of docs/control.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from planted_readout import SITE, Planted

from trimtab.control.arm import ARM_KINDS
from trimtab.control.comparison import Comparison
from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel

PAGE = Path(__file__).parents[2] / "docs" / "control.md"


def test_the_examples(planted: LanguageModel, planted_dictionary: Standard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.control.arm.ARM_KINDS", dict(ARM_KINDS))
    first, own = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    first = first.replace("resid_post.15", SITE).replace('"vector", ', "")
    names: dict[str, object] = {"model": planted, "sae": planted_dictionary, "task": Planted.load()}
    labels = []
    for example in (first, own):
        exec(example, names)
        found = names["comparison"]
        assert isinstance(found, Comparison)
        assert not found.missing
        labels.append([arm.label for arm in found.result.arms])
    assert labels[0] == ["unsteered", "static", "random at equal dose", "random at equal kl", "prompting"]
    assert labels[1][2:] == ["last-feature", "last-feature at equal dose", "last-feature at equal kl"]
