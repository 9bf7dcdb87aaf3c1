"""How good a judge of concepts is: on labelled texts that it was not fitted on, and on garbled ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trimtab.runs.figures import Mark, plot_intervals
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, INTERVAL, Column, Table
from trimtab.stats import Interval, Resampled, Resamples, number_text, wilson_interval
from trimtab.stats.resamples import auc, ratio
from trimtab.stats.samples import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Judging = Callable[[Sequence[str]], NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class ConceptQuality:
    """Of one concept; intervals resample texts."""

    concept: str
    having: int
    """Texts that have it."""
    accuracy: Interval
    """Mean of `recall` and 1 − `false_positives`: 0.5 is chance."""
    auc: Interval
    """Of the probabilities."""
    recall: Interval
    """Share of the texts that have it in which it is found."""
    false_positives: Interval
    """Share of the texts that lack it in which it is found."""
    on_none: Interval | None
    """The same among texts that have none of the concepts; None if there are none."""


@dataclass(frozen=True, kw_only=True)
class GarbledQuality:
    """Texts that were spoilt: no concept should be found."""

    kind: str
    found: Interval
    """Share in which some concept is found."""


@dataclass(frozen=True, kw_only=True, repr=False)
class JudgeQuality(Result):
    """What a judge is worth."""

    fitted: int
    """Texts that it was fitted on."""
    heldout: int
    """Texts that it was measured on."""
    gibberish: int
    """Labelled texts that are gibberish by the rules, and were left out of both."""
    seed: int
    accuracy: Interval
    """Mean over concepts."""
    concepts: tuple[ConceptQuality, ...]
    garbled: tuple[GarbledQuality, ...]

    def headline(self) -> str:
        worst = min(self.concepts, key=lambda one: one.accuracy.estimate)
        return (
            f"judge of {len(self.concepts)} concepts: accuracy {number_text(self.accuracy, INTERVAL)} (0.5 is chance) "
            f"on {self.heldout:,} texts, fitted on {self.fitted:,} others; worst for {worst.concept}, "
            f"{number_text(worst.accuracy, INTERVAL)}"
        )

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
        garbled = [Column("spoilt texts", "kind"), Column("some concept found", "found", INTERVAL)]
        return {
            "concepts": Table(columns=columns, rows=self.concepts),
            "garbled": Table(columns=garbled, rows=self.garbled),
        }

    def draw(self, ax: Axes) -> None:
        """Accuracy per concept."""
        plot_intervals(ax, [Mark(one.concept, one.accuracy) for one in self.concepts], "accuracy of the judge", ".3f")


def measure_quality(
    concepts: Sequence[str],
    texts: Sequence[str],
    labels: NDArray[np.bool_],
    probabilities: NDArray[np.float64],
    has: Judging,
    *,
    fitted: int,
    gibberish: int,
    seed: int,
) -> JudgeQuality:
    """Measure a judge.

    Args:
        concepts: C names.
        texts: N labelled texts that it was not fitted on.
        labels: `[N, C]` what they have.
        probabilities: `[N, C]` what it says of them.
        has: what it decides on texts, `[N, C]`.
        fitted, gibberish, seed: for the result.
    """
    found = has(texts)
    none = ~labels.any(axis=1)
    resamples = Resamples(range(len(texts)), seed=seed)
    each: list[ConceptQuality] = []
    accuracies: list[Resampled] = []
    for c, name in enumerate(concepts):
        yes, said = labels[:, c], found[:, c]
        accuracies.append(resamples.of(partial(balanced, said, yes)))
        each.append(
            ConceptQuality(
                concept=name,
                having=int(yes.sum()),
                accuracy=accuracies[-1].interval,
                auc=resamples.of(partial(auc, probabilities[:, c], yes)).interval,
                recall=_share(said[yes]),
                false_positives=_share(said[~yes]),
                on_none=_share(said[none]) if none.any() else None,
            )
        )
    rng = np.random.default_rng([seed, 2])
    garbled = {kind: [spoil(text, rng) for text in texts] for kind, spoil in GARBLED.items()}
    return JudgeQuality(
        fitted=fitted,
        heldout=len(texts),
        gibberish=gibberish,
        seed=seed,
        accuracy=Resampled.mean(accuracies).interval,
        concepts=tuple(each),
        garbled=tuple(
            GarbledQuality(kind=kind, found=_share(np.asarray(has(t).any(axis=1)))) for kind, t in garbled.items()
        ),
    )


def balanced(said: NDArray[np.bool_], yes: NDArray[np.bool_], weights: FloatArray) -> FloatArray:
    """`[R]`, mean of the shares of right decisions on texts that have it and on those that lack it."""
    return (ratio(said & yes, yes, weights) + ratio(~said & ~yes, ~yes, weights)) / 2


def _share(found: NDArray[np.bool_]) -> Interval:
    return wilson_interval(int(found.sum()), len(found))


def _looped(text: str, _rng: np.random.Generator) -> str:
    return " ".join(text.split()[:4] * 12)


def _letters_shuffled(text: str, rng: np.random.Generator) -> str:
    return "".join(rng.permutation(list(text)))


def _words_shuffled(text: str, rng: np.random.Generator) -> str:
    return " ".join(rng.permutation(text.split()))


GARBLED: dict[str, Callable[[str, np.random.Generator], str]] = {
    "first words repeated": _looped,
    "letters shuffled": _letters_shuffled,
    "words shuffled": _words_shuffled,
}
"""Ways to spoil a text. A judge that looks at words cannot tell the last from text."""
