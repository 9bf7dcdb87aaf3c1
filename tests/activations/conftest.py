from __future__ import annotations

import numpy as np
import pytest

from trimtab.activations import Document

WORDS = [
    "the",
    "tide",
    "and",
    "boat",
    "turned",
    "then",
    "an",
    "anchor",
    "in",
    "harbour",
    "over",
    "water",
    "her",
    "reef",
]


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Forty short texts, some of them chats."""
    rng = np.random.default_rng(7)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(8, 40))) for _ in range(40)]
    return [
        Document(f"doc-{i}", f"<user>{text}<eos><model>ay<eos>" if i % 5 == 0 else text, "test")
        for i, text in enumerate(texts)
    ]
