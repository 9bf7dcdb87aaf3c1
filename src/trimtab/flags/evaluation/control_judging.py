"""Which texts are about a concept, by a judge that is not the model, and how good that judge is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.flags.data.checking import JudgeCheck, check_knows
from trimtab.flags.examples import Example
from trimtab.judges import ConceptJudge
from trimtab.judges.concept_quality import JudgeQuality, measure_quality
from trimtab.judges.gibberish import find_gibberish
from trimtab.runs import text_id


class JudgesConcepts(Protocol):
    """What finds concepts in texts, such as `judges.concepts.ConceptJudge`. It is shown nothing but the texts.

    It may have `probabilities(texts) -> [N, C]`, too, which decide between ways of control that are equally good.
    """

    @property
    def concepts(self) -> Sequence[str]:
        """Names that it knows."""
        ...

    def has(self, texts: Sequence[str], /) -> NDArray[np.bool_]:
        """`[N, C]`, whether each text is about each of `concepts`."""
        ...


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
        check_knows(known, concepts)
        self.judge, self.concepts = judge, tuple(concepts)
        self._columns = [known.index(concept) for concept in concepts]
        self._known = len(known)

    def fluent(self, texts: Sequence[str]) -> Bool[np.ndarray, " N"]:
        """Whether texts are language that a reader could follow; rates count no others."""
        return np.array([not find_gibberish(text) for text in texts], bool)

    def has(self, texts: Sequence[str]) -> Bool[np.ndarray, "N C"]:
        """Whether texts are about each concept. Raises a `UserError` if the judge does not say so of each."""
        return self._of(self.judge.has(list(texts)), len(texts)).astype(bool)

    def probabilities(self, texts: Sequence[str]) -> Float[np.ndarray, "N C"] | None:
        """How likely texts are about each concept; None by a judge that does not say."""
        ask = getattr(self.judge, "probabilities", None)
        return None if ask is None else self._of(ask(list(texts)), len(texts)).astype(float)

    def _of(self, answer: object, n: int) -> NDArray[np.generic]:
        found = np.asarray(answer)
        if found.shape != (n, self._known):
            why = f"it answers {found.shape} for {n} texts and {self._known} concepts"
            raise UserError(f"the {type(self.judge).__name__} that judges", why, "let has(texts) give [N, C]")
        return found[:, self._columns]

    def quality(self, examples: Sequence[Example], seed: int = 0) -> JudgeQuality | None:
        """How often the judge is right about labelled responses that it was not fitted on.

        Args:
            examples: the responses with their labels; without any, what the judge itself knows of its quality.
            seed: of the bootstrap.
        """
        own = getattr(self.judge, "quality", None)
        known = own if isinstance(own, JudgeQuality) else None
        if not examples:
            return known
        texts, units = [one.response for one in examples], [one.unit for one in examples]
        labels = np.array([[concept in example.concepts for concept in self.concepts] for example in examples])
        return measure_quality(
            self.concepts, self.has(texts), labels, probabilities=self.probabilities(texts), units=units,
            fitted=known.fitted if known else 0, seed=seed,
        )  # fmt: skip

    def identity(self, examples: Sequence[Example]) -> str:
        """Names the judge: by its weights, or by what it says of some examples if it is of another kind."""
        if isinstance(self.judge, ConceptJudge):
            return JudgeCheck(self.judge, self.concepts).name
        said = self.has([example.response for example in examples])
        return f"{type(self.judge).__name__} {text_id(said.tobytes().hex())}"


def check_unseen(judge: JudgesConcepts, examples: Sequence[Example], of: str) -> None:
    """Raise a `UserError` if a judge says that it was fitted on responses of some examples.

    Args:
        judge: if it has `has_seen(texts)`, as a `ConceptJudge` does.
        examples: those that a model was trained on or held out.
        of: what the model is called.
    """
    seen = getattr(judge, "has_seen", None)
    if seen is not None and (n := sum(seen([example.response for example in examples]))):
        why = f"{n:,} of the texts that it was fitted or measured on are responses that {of} was trained on or held out"
        raise UserError("the judge", why, "fit it on other texts, such as `flags import --judge-share` keeps")
