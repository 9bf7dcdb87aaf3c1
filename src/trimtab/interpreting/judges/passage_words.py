"""Words of a passage, whatever its tokens are: windows come in a model's tokens, steered texts as strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.interpreting.judge import Passage

_WORD = re.compile(r"\w+|[^\w\s]|\n")
"""A word, a mark or the end of a line: each may be all that a feature fires on."""


class Words(NamedTuple):
    """A passage's words in lower case."""

    words: list[str]
    fires: NDArray[np.float64] | None
    """`[W]` how strongly the feature fires on each, as a share of `largest`; None where that is not known."""


def words_of(passage: Passage, largest: float = 1.0) -> Words:
    """The words of a passage, each firing as strongly as the strongest of its tokens.

    Args:
        passage: which.
        largest: activation that counts as 1.
    """
    found = list(_WORD.finditer(passage.text))
    words = [match.group().lower() for match in found]
    if not passage.activations:
        return Words(words, None)
    ends = np.cumsum([len(token) for token in passage.tokens])
    starts = ends - [len(token) for token in passage.tokens]
    activations = np.clip(np.asarray(passage.activations, float) / largest, 0.0, 1.0)
    fires = np.array(
        [activations[(starts < match.end()) & (ends > match.start())].max(initial=0.0) for match in found], float
    )
    return Words(words, fires)


def largest_activation(passages: Sequence[Passage]) -> float:
    """Of a feature in some passages; 1 where none is known."""
    return max((max(one.activations) for one in passages if one.activations), default=1.0) or 1.0
