"""How good a judge of concepts is, on labelled texts that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, INTERVAL, Column, Table
from trimtab.stats import Interval, Resampled, Resamples, number_text, wilson_interval
from trimtab.stats.resamples import auc, balanced


@dataclass(frozen=True, kw_only=True)
class ConceptQuality:
    """Of one concept; intervals are over texts, or over documents where texts are passages of some.

    What needs texts that have it, or lack it, is None where there are none."""

    concept: str
    having: int
    """Texts that have it."""
    accuracy: Interval | None
    """Mean of `recall` and 1 − `false_positives`: 0.5 is chance."""
    auc: Interval | None
    """Of the probabilities; None for a judge that gives none."""
    recall: Interval | None
    """Share of the texts that have it in which it is found."""
    false_positives: Interval | None
    """Share of the texts that lack it in which it is found."""
    on_none: Interval | None
    """The same among texts that have none of the concepts."""


@dataclass(frozen=True, kw_only=True, repr=False)
class JudgeQuality(Result):
    """What a judge is worth."""

    fitted: int
    """Texts that it was fitted on."""
    heldout: int
    """Texts that it was measured on."""
    documents: int
    """That these are of, none of which it was fitted on; 0 where no document is known."""
    gibberish: int
    """Labelled texts that are gibberish by the rules, and were left out of both."""
    seed: int
    accuracy: Interval | None
    """Mean over concepts that some texts have and some lack."""
    concepts: tuple[ConceptQuality, ...]

    def headline(self) -> str:
        known = [(one.accuracy, one.concept) for one in self.concepts if one.accuracy is not None]
        texts = f"{self.heldout:,} texts" + (f" of {self.documents:,} documents" if self.documents else "")
        of = f"fitted on {self.fitted:,} {'of others' if self.documents else 'others'}"
        accuracy = f"{number_text(self.accuracy, INTERVAL)} (0.5 is chance)"
        worst = min(known, key=lambda pair: pair[0].estimate, default=(None, "none"))
        lowest = f"worst for {worst[1]}, {number_text(worst[0], INTERVAL)}"
        return f"judge of {len(self.concepts)} concepts: accuracy {accuracy} on {texts}, {of}; {lowest}"

    def tables(self) -> dict[str, Table]:
        columns = [
            Column("concept", "concept", whole=True),
            Column("texts", "having", COUNT, spare=3),
            Column("accuracy", "accuracy", INTERVAL),
            Column("AUC", "auc", INTERVAL, spare=1),
            Column("found where it is", "recall", INTERVAL, spare=2),
            Column("found where it is not", "false_positives", INTERVAL),
            Column("in texts of none", "on_none", INTERVAL),
        ]
        return {"concepts": Table(columns=columns, rows=self.concepts)}


def measure_quality(
    concepts: Sequence[str],
    said: NDArray[np.bool_],
    labels: NDArray[np.bool_],
    *,
    probabilities: NDArray[np.float64] | None = None,
    units: Sequence[str | None] = (),
    fitted: int = 0,
    gibberish: int = 0,
    seed: int = 0,
) -> JudgeQuality:
    """What any judge said of labelled texts, beside their labels.

    Args:
        concepts: C names.
        said: `[N, C]` whether it found each in N texts that it was not fitted on.
        labels: `[N, C]` whether they have it.
        probabilities: `[N, C]`, if it gives some.
        units: the document of each text, where it is a passage of one.
        fitted, gibberish: for the result.
        seed: of the bootstrap.
    """
    numbers = unit_numbers(units or [None] * len(labels))
    none, resamples = ~labels.any(axis=1), Resamples(numbers, seed=seed)
    each: list[ConceptQuality] = []
    accuracies: list[Resampled] = []
    for c, name in enumerate(concepts):
        yes, found = labels[:, c], said[:, c]
        both = bool(yes.any() and not yes.all())
        if both:
            accuracies.append(resamples.of(partial(balanced, found, yes)))
        ranked = resamples.of(partial(auc, probabilities[:, c], yes)) if both and probabilities is not None else None
        each.append(
            ConceptQuality(
                concept=name,
                having=int(yes.sum()),
                accuracy=accuracies[-1].interval if both else None,
                auc=None if ranked is None else ranked.interval,
                recall=_share(found[yes], numbers[yes]),
                false_positives=_share(found[~yes], numbers[~yes]),
                on_none=_share(found[none], numbers[none]),
            )
        )
    return JudgeQuality(
        fitted=fitted,
        heldout=len(labels),
        documents=len({unit for unit in units if unit is not None}),
        gibberish=gibberish,
        seed=seed,
        accuracy=Resampled.mean(accuracies).interval if accuracies else None,
        concepts=tuple(each),
    )


def unit_numbers(units: Sequence[str | None]) -> NDArray[np.int64]:
    """`[N]` number of what each text belongs to, in the order of their first texts: its document, or itself."""
    known: dict[str | int, int] = {}
    return np.array([known.setdefault(i if unit is None else unit, len(known)) for i, unit in enumerate(units)], int)


def _share(found: NDArray[np.bool_], units: NDArray[np.int64]) -> Interval | None:
    """Share of texts, with the interval of as many as they have documents."""
    n = len(np.unique(units))
    return wilson_interval(int(found.sum()) * n / len(found), n) if n else None
