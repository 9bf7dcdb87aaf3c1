"""The examples of docs/features.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import trimtab
from trimtab.activations import Document
from trimtab.dictionaries import Standard
from trimtab.features import FeatureProfile
from trimtab.lm import LanguageModel

PAGE = Path(__file__).parents[2] / "docs" / "features.md"


def test_the_examples(
    tiny_llama: LanguageModel, sae: Standard, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trimtab, "load_model", lambda name: tiny_llama, raising=False)
    monkeypatch.setattr(trimtab, "load_sae", lambda name, model: sae, raising=False)
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL):
        exec(example.replace("2112", "12"), names)
    assert names["windows"]
    assert isinstance(names["found"], FeatureProfile)
