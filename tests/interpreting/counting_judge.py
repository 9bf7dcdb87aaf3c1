"""A judge that counts letters, and models whose directions write some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.interpreting import Exemplars, Meaning, Passage, Rating, ToRate
from trimtab.judges import Unjudged


@dataclass(kw_only=True)
class CountingJudge:
    """A concept is a letter, and a text has it by how often it stands there. Nothing is said of some texts."""

    unsure_of: str = "\0"
    name: str = "letters"
    version: str = "3"
    asked: int = 0

    def explain(self, exemplars: Sequence[Exemplars]) -> list[Meaning | Unjudged]:
        return [
            Unjudged("no exemplars") if not one.has else Meaning(name=one.name, text=f"the letter {one.name}")
            for one in exemplars
        ]

    def fires(self, meanings: Sequence[Meaning], passages: Sequence[Sequence[Passage]]) -> list[Any]:
        return [np.array([float(m.name in p.text) for p in some]) for m, some in zip(meanings, passages, strict=True)]

    def rate(self, texts: Sequence[ToRate]) -> list[Rating | Unjudged]:
        self.asked += len(texts)
        return [self._rate(one) for one in texts]

    def _rate(self, one: ToRate) -> Rating | Unjudged:
        if self.unsure_of in one.text:
            return Unjudged("unsure")
        more = [text.count(one.meaning.name) / max(1, len(text)) for text in (one.text, one.unsteered)]
        return Rating(concept=2 * max(0.0, more[0] - more[1]), instruction=1.5, fluency=2.0)


def letters(name: str, others: str) -> Exemplars:
    """Texts of a letter, and of others."""

    def text(letter: str, n: int) -> Passage:
        return Passage(tokens=tuple(f"{letter}{letter} " for _ in range(3 + n % 4)))

    return Exemplars(
        name=name,
        has=tuple(text(name, n) for n in range(8)),
        lacks=tuple(text(others[n % len(others)], n) for n in range(8)),
    )
