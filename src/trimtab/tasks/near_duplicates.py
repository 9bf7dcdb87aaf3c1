"""Prompts that say nearly the same: a test must not repeat training prompts in other words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

THRESHOLD = 0.4
SHINGLE = 5
_ROWS = 256
"""Texts that are compared with all others at once."""

# Words that requests of any content share.
_FRAME_WORDS = """
a an and are as at be by can create describe detailed develop do explain for from generate give guide how i in
instructions is it make me my of on or our provide should someone step steps tell that the their them this to
tutorial using ways what which who with without write you your
"""
_FRAME = frozenset(_FRAME_WORDS.split())


def drop_near_duplicates(texts: Sequence[str], references: Iterable[str]) -> list[bool]:
    """Which texts to keep: those that are no near-duplicate of a reference."""
    signed = [Signature(reference) for reference in references]
    return [not any(signature.is_near(other) for other in signed) for signature in map(Signature, texts)]


def clusters(texts: Sequence[str]) -> list[int]:
    """For each text the index of the first text that it is joined to through near-duplicates."""
    signed = [Signature(text) for text in texts]
    first = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if first[i] != first[j] and signed[i].is_near(signed[j]):
                old, new = max(first[i], first[j]), min(first[i], first[j])
                first = [new if place == old else place for place in first]
    return first


def first_of_each(texts: Sequence[str]) -> list[bool]:
    """Which texts to keep so that none is a near-duplicate of one that is kept before it. For thousands at once."""
    if not texts:
        return []
    signed = [Signature(text) for text in texts]
    words, shingles = [one.words for one in signed], [one.shingles for one in signed]
    n_words, n_shingles = (np.array([len(each) for each in sets]) for sets in (words, shingles))
    several = n_words >= 2
    word_table, shingle_table = _table(words), _table(shingles)
    kept = np.zeros(len(texts), dtype=bool)
    for start in range(0, len(texts), _ROWS):
        stop = min(start + _ROWS, len(texts))
        near = _alike_rows(word_table, n_words, start, stop) & several[start:stop, None] & several[None, :stop]
        near |= _alike_rows(shingle_table, n_shingles, start, stop)
        for i in range(start, stop):
            kept[i] = not (near[i - start, :i] & kept[:i]).any()
    return kept.tolist()


def _table(sets: Sequence[frozenset[str]]) -> csr_array:
    """A row for each set, a column for each of all their elements."""
    columns: dict[str, int] = {}
    indices = np.array([columns.setdefault(one, len(columns)) for each in sets for one in each], dtype=np.int64)
    ends = np.cumsum([0, *map(len, sets)])
    return csr_array((np.ones(len(indices), dtype=np.int32), indices, ends), shape=(len(sets), max(1, len(columns))))


def _alike_rows(table: csr_array, sizes: NDArray[np.int64], start: int, stop: int) -> NDArray[np.bool_]:
    """`[stop − start, stop]`, whether the Jaccard index of some sets with all up to them reaches the threshold."""
    shared = (table[start:stop] @ table[:stop].T).toarray()
    union = sizes[start:stop, None] + sizes[None, :stop] - shared
    return np.divide(shared, union, out=np.zeros(shared.shape), where=union > 0) >= THRESHOLD


class Signature:
    """A text's content words without their commonest endings, and the character 5-grams of the same words in order.

    Two texts are near-duplicates if either set's Jaccard index reaches `THRESHOLD`: 5-grams see small edits, words
    see the same request in another order. Words that frame any request ("explain step by step how to …") are left out,
    unless there is nothing else. Paraphrases in other words are not seen.
    """

    def __init__(self, text: str) -> None:
        words = re.findall(r"\w+", text.casefold())
        content = [word for word in words if word not in _FRAME]
        line = f" {' '.join(content or words)} "
        self.shingles = frozenset(line[i : i + SHINGLE] for i in range(max(1, len(line) - SHINGLE + 1)))
        self.words = frozenset(re.sub(r"(?<=\w\w\w)(?:ing|ed|es|e|s)$", "", word) for word in content)

    def is_near(self, other: Signature) -> bool:
        """Whether the texts are near-duplicates."""
        if _alike(self.shingles, other.shingles):
            return True
        return min(len(self.words), len(other.words)) >= 2 and _alike(self.words, other.words)


def _alike(a: frozenset[str], b: frozenset[str]) -> bool:
    """Whether the Jaccard index reaches the threshold. Sizes alone rule most pairs out."""
    return min(len(a), len(b)) >= THRESHOLD * max(len(a), len(b)) and jaccard(a, b) >= THRESHOLD


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Size of the intersection over size of the union; 0 for two empty sets."""
    union = len(a | b)
    return len(a & b) / union if union else 0.0
