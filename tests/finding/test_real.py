"""A wish on the default model, from one line to what steers."""

from __future__ import annotations

import pytest

from trimtab.dictionaries import load_dictionary
from trimtab.finding import find
from trimtab.lm import LanguageModel


@pytest.mark.real
@pytest.mark.slow
def test_the_sea_on_the_default_model(real_model: LanguageModel) -> None:
    sae = load_dictionary("default", model=real_model)
    found = find(real_model, sae, "the sea, ships and sailors", way=(), set_size=1, examples=(6, 6, 12))
    assert found.found.own.effect.low > 0
    assert found.agreement[0].spearman.estimate > 0.5
    assert found.texts[0].texts[found.found.name] != found.texts[0].texts["unsteered"]
