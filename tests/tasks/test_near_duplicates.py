"""Near-duplicates among thousands are those that the plain comparison of two texts finds."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.tasks import near_duplicates
from trimtab.tasks.near_duplicates import Signature, first_of_each

WORDS = [
    "harbour",
    "lantern",
    "meadow",
    "orchard",
    "pebble",
    "quarry",
    "ribbon",
    "saddle",
    "thimble",
    "umbrella",
    "violin",
    "walnut",
    "the",
    "and",
    "how",
]


@pytest.mark.parametrize("rows", [3, 256])
def test_the_first_of_each_is_kept(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_ROWS", rows)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(1, 9))) for _ in range(120)] + ["", "a", "?!"]
    kept: list[Signature] = []
    wanted: list[bool] = []
    for signature in map(Signature, texts):
        wanted.append(not any(signature.is_near(other) for other in kept))
        kept += [signature] * wanted[-1]
    assert first_of_each(texts) == wanted
    assert 10 < sum(wanted) < 110


def test_nothing_to_compare() -> None:
    assert first_of_each([]) == []
    assert first_of_each(["one text"]) == [True]
