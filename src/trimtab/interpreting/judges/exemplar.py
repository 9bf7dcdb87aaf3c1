"""No chat model and no network: small classifiers fitted on where a feature fires and where it does not.

Where a feature fires (`fires`, which interpretability is measured by) is said by embeddings of words and texts, and
whether a text has it (`rate`, which utility is measured by) by words and letters, each fitted on other exemplars. Were
both said by the same classifier, features that it happens to know well would score high on either, and the two would
be correlated whatever is true of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from jaxtyping import Float
from numpy import ndarray

from trimtab.interpreting.judge import Exemplars, Meaning, Passage, Rating, ToRate
from trimtab.interpreting.judges.combining import Combined, too_few
from trimtab.interpreting.judges.detectors import (
    CountedWords,
    EmbeddedText,
    EmbeddedWords,
    Fitting,
    WordsAndLetters,
)
from trimtab.interpreting.judges.embeddings import TokenEmbeddings
from trimtab.interpreting.judges.rating import rate_texts
from trimtab.interpreting.judges.rules import WORDS_SHOWN, divide
from trimtab.judges import Unjudged

SURFACE: dict[str, Fitting] = {"words and letters": WordsAndLetters, "counted words": CountedWords}
"""What says whether a text has a concept."""


class _Fitted:
    """Classifiers of one feature, each fitted when it is first asked."""

    def __init__(self, embedded: dict[str, Fitting], fires: Exemplars, rates: Exemplars) -> None:
        self._embedded, self._fires, self._rates = embedded, fires, rates

    @cached_property
    def fires(self) -> Combined:
        return Combined(self._embedded, self._fires.has, self._fires.lacks)

    @cached_property
    def rates(self) -> Combined:
        return Combined(SURFACE, self._rates.has, self._rates.lacks)


@dataclass(frozen=True, kw_only=True)
class ExemplarJudge:
    """Fits classifiers on exemplars; several are weighed by cross-validation. Its words for a feature are those that it
    fires on most often; it decides by all exemplars."""

    embeddings: str = "smollm2-135m-instruct"
    """Model whose embedding table says what words mean; no layer of it runs."""
    disjoint: bool = True
    """Say where a feature fires by every second exemplar, and whether a text has it by the others."""

    @property
    def version(self) -> str:
        return "1"

    @property
    def name(self) -> str:
        """`exemplar(MODEL)`."""
        return f"exemplar({self.embeddings})"

    @cached_property
    def _fittings(self) -> dict[str, Fitting]:
        from trimtab.lm import load_model

        table = TokenEmbeddings(load_model(self.embeddings))
        return {"embedded text": partial(EmbeddedText, table), "embedded words": partial(EmbeddedWords, table)}

    def explain(self, exemplars: Sequence[Exemplars]) -> list[Meaning | Unjudged]:
        """What features mean, in order.

        Raises:
            UserError: the model of the embeddings cannot be loaded.
        """
        return [self._explain(one) for one in exemplars]

    def _explain(self, one: Exemplars) -> Meaning | Unjudged:
        fires, rates = divide(one, self.disjoint)
        if gap := too_few(fires.has, fires.lacks) or too_few(rates.has, rates.lacks):
            return gap
        words = CountedWords(fires.has, fires.lacks).strongest[:WORDS_SHOWN]
        return Meaning(name=one.name, text=", ".join(words), by=_Fitted(self._fittings, fires, rates))

    def fires(
        self, meanings: Sequence[Meaning], passages: Sequence[Sequence[Passage]]
    ) -> list[Float[ndarray, " N"] | Unjudged]:
        """For each meaning how likely the feature fires in each of its passages, by embeddings."""
        return [meaning.by.fires.probabilities(texts) for meaning, texts in zip(meanings, passages, strict=True)]

    def rate(self, texts: Sequence[ToRate]) -> list[Rating | Unjudged]:
        """The scores of texts, in order, the concept's by words and letters; see `rate_texts`."""
        return rate_texts(texts, lambda meaning, passages: meaning.by.rates.probabilities(passages))
