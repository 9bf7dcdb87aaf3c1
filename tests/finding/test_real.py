"""A wish on the default model, from one line to what steers."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.dictionaries import load_dictionary
from trimtab.finding import Want, find
from trimtab.lm import LanguageModel


@pytest.mark.real
@pytest.mark.slow
def test_the_sea_on_the_default_model(real_model: LanguageModel) -> None:
    sae = load_dictionary("default", model=real_model)
    small: dict[str, Any] = {"examples": (24, 8, 16), "n_neutral": (3, 4), "shortlist": 2, "tried": 1}
    wish = Want(text="the sea, ships and sailors", pairs=48)
    found = find(real_model, sae, wish, way=("mean-difference",), max_new_tokens=12, **small)
    assert found.found.shown.effect.low > 0
    assert found.found.shown.kl.estimate < 0.8
    assert found.texts[0].texts[found.found.name] != found.texts[0].texts["unsteered"]
