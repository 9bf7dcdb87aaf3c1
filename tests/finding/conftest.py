"""A model and dictionaries at three sites in which effects are planted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from planted_wishes import Ground, planted_ground

from trimtab.lm import LanguageModel


@pytest.fixture(scope="session")
def ground(tiny_llama: LanguageModel) -> Ground:
    """In single precision."""
    return planted_ground(tiny_llama)


@pytest.fixture(scope="session")
def exact_ground(tiny_llama: LanguageModel) -> Ground:
    """In double precision, for finite differences."""
    return planted_ground(tiny_llama, double=True)
