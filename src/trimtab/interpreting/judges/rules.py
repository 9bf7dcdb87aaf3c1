"""The control: a feature fires where the words stand on which it fired most often; nothing else is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from numpy import ndarray

from trimtab.interpreting.judge import Exemplars, Meaning, Passage, Rating, ToRate
from trimtab.interpreting.judges.combining import too_few
from trimtab.interpreting.judges.detectors import CountedWords
from trimtab.interpreting.judges.rating import rate_texts
from trimtab.judges import Unjudged

WORDS_SHOWN = 8
"""Words of a meaning."""


class _Halves(NamedTuple):
    """Detectors on disjoint exemplars."""

    fires: CountedWords
    rates: CountedWords


@dataclass(frozen=True, kw_only=True)
class RuleFeatureJudge:
    """Counts on which words a feature fires. A passage is as likely as its likeliest word."""

    disjoint: bool = True
    """Say where a feature fires by every second exemplar, and whether a text has it by the others."""

    @property
    def name(self) -> str:
        """`rules`."""
        return "rules"

    @property
    def version(self) -> str:
        return "1"

    def explain(self, exemplars: Sequence[Exemplars]) -> list[Meaning | Unjudged]:
        """The words on which features fire, in order."""
        return [self._explain(one) for one in exemplars]

    def _explain(self, one: Exemplars) -> Meaning | Unjudged:
        fires, rates = divide(one, self.disjoint)
        if gap := too_few(fires.has, fires.lacks) or too_few(rates.has, rates.lacks):
            return gap
        by = _Halves(*(CountedWords(part.has, part.lacks) for part in (fires, rates)))
        return Meaning(name=one.name, text=", ".join(by.fires.strongest[:WORDS_SHOWN]), by=by)

    def fires(
        self, meanings: Sequence[Meaning], passages: Sequence[Sequence[Passage]]
    ) -> list[Float[ndarray, " N"] | Unjudged]:
        """How often each feature fires on the likeliest word of each of its passages."""
        return [meaning.by.fires.scores(texts) for meaning, texts in zip(meanings, passages, strict=True)]

    def rate(self, texts: Sequence[ToRate]) -> list[Rating | Unjudged]:
        """The scores of texts, in order; see `rate_texts`."""
        return rate_texts(texts, lambda meaning, passages: meaning.by.rates.scores(passages))


def divide(one: Exemplars, disjoint: bool) -> tuple[Exemplars, Exemplars]:
    """Every second exemplar of either kind, and the others; all of them twice unless they are to be disjoint."""
    if not disjoint:
        return one, one
    halves = [Exemplars(name=one.name, has=one.has[first::2], lacks=one.lacks[first::2]) for first in (0, 1)]
    return halves[0], halves[1]
