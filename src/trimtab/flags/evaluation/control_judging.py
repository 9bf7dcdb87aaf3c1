"""Which texts are about a concept, by a judge that is not the model, and how good that judge is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from trimtab.errors import UserError, did_you_mean
from trimtab.flags.examples import Example
from trimtab.judges.concept_quality import JudgeQuality, balanced
from trimtab.judges.gibberish import find_gibberish
from trimtab.stats import Interval, Resamples, wilson_interval


class JudgesConcepts(Protocol):
    """What finds concepts in texts, such as `judges.concepts.ConceptJudge`. It is shown nothing but the texts."""

    @property
    def concepts(self) -> Sequence[str]:
        """Names that it knows."""
        ...

    def has(self, texts: Sequence[str], /) -> NDArray[np.bool_]:
        """`[N, C]`, whether each text is about each of `concepts`."""
        ...


class Judged(NamedTuple):
    """What is known of N texts."""

    has: Bool[NDArray[np.bool_], "N C"]
    """Whether the judge finds each concept."""
    fluent: Bool[NDArray[np.bool_], " N"]
    """Whether it is language that a reader could follow; rates count no other texts."""


@dataclass(frozen=True, kw_only=True)
class JudgeAccuracy:
    """The judge beside the labels of held-out texts, for one concept; intervals over texts."""

    concept: str
    accuracy: Interval | None
    """Mean of `recall` and 1 − `false_positives`: 0.5 is chance; None if texts of one kind are missing."""
    recall: Interval | None
    """Share of the texts about the concept in which it finds it; None if there is none."""
    false_positives: Interval | None
    """Share of the other texts in which it finds it, too."""


class TextReader:
    """Reads texts by a judge, for some concepts in their order.

    Args:
        judge: see `JudgesConcepts`.
        concepts: which of the judge's.

    Raises:
        UserError: it is no judge, or does not know one of the concepts.
    """

    def __init__(self, judge: JudgesConcepts, concepts: Sequence[str]) -> None:
        if not callable(getattr(judge, "has", None)):
            hint = "give a ConceptJudge, or an object with concepts and has(texts)"
            raise UserError(f"the {type(judge).__name__} that is to judge", "it has no method has(texts)", hint)
        known = list(getattr(judge, "concepts", concepts))
        for concept in concepts:
            if concept not in known:
                hint = did_you_mean(concept, known, "fit a judge on texts about it, too")
                raise UserError(f"concept {concept!r}", f"the judge knows {', '.join(known)}", hint)
        self.judge, self.concepts = judge, tuple(concepts)
        self._columns = [known.index(concept) for concept in concepts]
        self._known = len(known)

    def read(self, texts: Sequence[str]) -> Judged:
        """What is known of texts.

        Raises:
            UserError: the judge's answer is not one for each text and concept.
        """
        return Judged(self.has(texts), np.array([not find_gibberish(text) for text in texts], bool))

    def has(self, texts: Sequence[str]) -> Bool[NDArray[np.bool_], "N C"]:
        """Whether texts are about each concept."""
        found = np.asarray(self.judge.has(list(texts)))
        if found.shape != (len(texts), self._known):
            why = f"it answers {found.shape} for {len(texts)} texts and {self._known} concepts"
            raise UserError(f"the {type(self.judge).__name__} that judges", why, "let has(texts) give [N, C]")
        return found[:, self._columns].astype(bool)

    def accuracy(self, examples: Sequence[Example], seed: int = 0) -> tuple[JudgeAccuracy, ...]:
        """How often the judge is right about labelled responses that it was not fitted on.

        Args:
            examples: the responses with their labels; without any, what the judge itself knows of its quality.
            seed: of the bootstrap.
        """
        if not examples:
            return self._own_quality()
        said = self.has([example.response for example in examples])
        labels = np.array([[concept in example.concepts for concept in self.concepts] for example in examples])
        resamples = Resamples(range(len(examples)), seed=seed)
        found: list[JudgeAccuracy] = []
        for concept, says, has in zip(self.concepts, said.T, labels.T, strict=True):
            both = bool(has.any() and not has.all())
            found.append(
                JudgeAccuracy(
                    concept=concept,
                    accuracy=resamples.of(partial(balanced, says, has)).interval if both else None,
                    recall=_share(says[has]),
                    false_positives=_share(says[~has]),
                )
            )
        return tuple(found)

    def _own_quality(self) -> tuple[JudgeAccuracy, ...]:
        quality = getattr(self.judge, "quality", None)
        if not isinstance(quality, JudgeQuality):
            return ()
        known = {one.concept: one for one in quality.concepts}
        names = [field.name for field in fields(JudgeAccuracy)]
        return tuple(
            JudgeAccuracy(**{name: getattr(known[concept], name) for name in names})
            for concept in self.concepts
            if concept in known
        )


def _share(found: NDArray[np.bool_]) -> Interval | None:
    return wilson_interval(int(found.sum()), len(found)) if len(found) else None
