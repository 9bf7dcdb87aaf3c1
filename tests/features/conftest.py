from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "steering"))
sys.path.insert(0, str(Path(__file__).parent))

from tiny_dictionary import make_dictionary

from trimtab.activations import Document
from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel

WORDS = ["the", "tide", "and", "boat", "turned", "then", "an", "anchor", "in", "harbour", "over", "water", "her"]


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Twenty short texts, some of them chats, some shorter than a window."""
    rng = np.random.default_rng(7)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(2, 40))) for _ in range(20)]
    return [
        Document(f"doc-{i}", f"<user>{text}<eos><model>ay<eos>" if i % 5 == 0 else text, "test")
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def sae(tiny_llama: LanguageModel) -> Standard:
    """One feature in seven never fires."""
    return make_dictionary(tiny_llama)
