"""A small dictionary for every tiny model; puts this folder's own modules on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_dictionary import make_dictionary

from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel


@pytest.fixture
def sae(any_tiny: LanguageModel) -> Standard:
    """A dictionary for the model at hand."""
    return make_dictionary(any_tiny)
