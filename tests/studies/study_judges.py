"""A judge whose answers follow from texts alone, so that a study has something to rank."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trimtab.interpreting import Exemplars, Meaning, Passage, Rating, ToRate


def share(*texts: str) -> float:
    """From 0 to 1, by the texts."""
    return zlib.crc32("\0".join(texts).encode()) / 2**32


class ByText:
    """Decides by a checksum of what it reads."""

    name = "by-text"
    version = "1"

    def explain(self, exemplars: Sequence[Exemplars]) -> list[Meaning]:
        return [Meaning(name=one.name, text=one.has[0].text) for one in exemplars]

    def fires(self, meanings: Sequence[Meaning], passages: Sequence[Sequence[Passage]]) -> list[NDArray[np.float64]]:
        return [
            np.array([share(meaning.text, passage.text) for passage in each])
            for meaning, each in zip(meanings, passages, strict=True)
        ]

    def rate(self, texts: Sequence[ToRate]) -> list[Rating]:
        return [Rating(0.1 + share(one.meaning.text, one.text), 1.5, 2.0) for one in texts]
