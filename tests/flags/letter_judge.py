"""A judge of toy texts: one is about a concept if most of its letters are the concept's. It keeps what it was shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from toy_corpus import share_of


class LetterJudge:
    concepts = ("war", "sea")  # in an order of its own

    def __init__(self) -> None:
        self.shown: list[str] = []

    def has(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        self.shown += texts
        return np.array([[share_of(concept, [text]) > 0.5 for concept in self.concepts] for text in texts])
