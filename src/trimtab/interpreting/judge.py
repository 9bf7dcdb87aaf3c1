"""What a judge of features must be able to do: say what a feature means, where it fires, and whether a text has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trimtab.judges import Unjudged


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Some text, token by token."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...] = ()
    """Of a feature at each of the tokens; none where a judge must not know, or where no feature is meant."""

    @property
    def text(self) -> str:
        return "".join(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Exemplars:
    """Text that has something, and text that has not, from which a judge says what that is."""

    name: str
    """Of the feature or concept."""
    has: tuple[Passage, ...]
    """With activations where it is a feature's."""
    lacks: tuple[Passage, ...]


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a judge makes of a feature."""

    name: str
    """Of the feature or concept."""
    text: str
    """In words, or the words that the judge weighs most."""
    by: Any = field(default=None, repr=False, compare=False)
    """What the judge decides by, if it is more than the text."""


@dataclass(frozen=True, kw_only=True)
class ToRate:
    """A text that was written to an instruction under steering, and what it should be about."""

    meaning: Meaning
    instruction: str
    text: str
    unsteered: str
    """What the model writes to the same instruction by itself."""


def shuffled_meanings(meanings: Sequence[Meaning], seed: int) -> list[Meaning]:
    """Each in another's place, by a random cycle: what tells a judge that reads meanings from one that does not."""
    order = np.random.default_rng([seed, 3]).permutation(len(meanings))
    found = list(meanings)
    for place, other in zip(order, np.roll(order, 1), strict=True):
        found[place] = meanings[other]
    return found


class Rating(NamedTuple):
    """AxBench's three scores (arXiv 2501.17148), each from 0 to 2; a judge that is sure of nothing gives what lies
    between."""

    concept: float
    """Whether the text has the concept."""
    instruction: float
    """Whether it answers the instruction."""
    fluency: float
    """Whether it is fluent."""

    @property
    def overall(self) -> float:
        """The harmonic mean: 0 if one of them is."""
        return 0.0 if min(self) <= 0 else 3 / sum(1 / one for one in self)


@runtime_checkable
class FeatureJudge(Protocol):
    """Says what features mean, and reads texts for it. What it cannot say is `Unjudged`, never a score."""

    @property
    def name(self) -> str:
        """Names the judge and its model in reports."""
        ...

    @property
    def version(self) -> str:
        """Changes where the same question may get another answer."""
        ...

    def explain(self, exemplars: Sequence[Exemplars]) -> Sequence[Meaning | Unjudged]:
        """What features mean, in order."""
        ...

    def fires(
        self, meanings: Sequence[Meaning], passages: Sequence[Sequence[Passage]]
    ) -> Sequence[NDArray[np.float64] | Unjudged]:
        """For each meaning how likely the feature fires in each of its passages, which come without activations."""
        ...

    def rate(self, texts: Sequence[ToRate]) -> Sequence[Rating | Unjudged]:
        """The scores of texts, in order."""
        ...


@runtime_checkable
class PaidJudge(FeatureJudge, Protocol):
    """A judge that costs money."""

    @property
    def left(self) -> float:
        """Of its budget; infinite if it has none."""
        ...

    def cost(self, texts: Sequence[ToRate]) -> float:
        """What rating some texts costs at most, if each reply is of use."""
        ...
