"""The planted readout as fixtures, for the tests of control and of policies."""

from __future__ import annotations

import pytest
from planted_readout import planted_model, planted_sae

from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel


@pytest.fixture(scope="module")
def planted(tiny_llama: LanguageModel) -> LanguageModel:
    """Answers by the sign of one coordinate."""
    return planted_model(tiny_llama)


@pytest.fixture(scope="module")
def planted_dictionary(planted: LanguageModel) -> Standard:
    """Two of its features are that coordinate."""
    return planted_sae(planted)
