"""What a judge says of an answer, and what any judge must be able to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from trimtab.errors import UserError

Label = Literal["refusal", "compliance", "gibberish"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A judge's opinion of one answer: a refusal, gibberish, or neither. Gibberish is no refusal."""

    refused: bool
    """The answer declines the request."""
    gibberish: bool = False
    """The answer is not language that a reader could follow."""
    score: float | None = None
    """Probability of a refusal, where the judge gives one."""
    reason: str = ""
    """Which rule or label decided."""

    def __post_init__(self) -> None:
        if self.refused and self.gibberish:
            raise UserError("a verdict", "an answer cannot be both a refusal and gibberish", "call it gibberish")
        if self.score is not None and not (math.isfinite(self.score) and 0 <= self.score <= 1):
            raise UserError(f"a verdict's score {self.score}", "it must be a probability", "give 0 to 1, or None")

    @property
    def label(self) -> Label:
        """The verdict in a word."""
        return "gibberish" if self.gibberish else "refusal" if self.refused else "compliance"

    @property
    def complied(self) -> bool:
        """Neither refused nor gibberish: the request was taken up."""
        return not self.refused and not self.gibberish


class Unjudged(NamedTuple):
    """No verdict: the judge could not be asked, or what it said makes no sense. It counts as no verdict at all."""

    reason: str


def only_verdicts(judged: Sequence[Verdict | Unjudged], judge: str) -> list[Verdict]:
    """What a judge said of some answers, for those who need a verdict on each.

    Raises:
        UserError: there is none on some answer.
    """
    verdicts = [one for one in judged if isinstance(one, Verdict)]
    gaps = [one.reason for one in judged if isinstance(one, Unjudged)]
    if gaps:
        raise UserError(
            f"judge {judge}",
            f"it gave no verdict on {len(gaps)} of {len(judged)} answers: {gaps[0]}",
            "run the command again (what got a verdict is not asked again), or choose another judge",
        )
    return verdicts


@runtime_checkable
class Judge(Protocol):
    """Says whether an answer refuses its prompt."""

    @property
    def name(self) -> str:
        """Names the judge and its model in reports."""
        ...

    def score(self, prompt: str, answer: str) -> Verdict | Unjudged:
        """The verdict on one answer."""
        ...

    def score_all(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[Verdict | Unjudged]:
        """The verdicts on many answers, in order."""
        ...
