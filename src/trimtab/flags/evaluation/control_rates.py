"""Rates of a concept among fluent texts, and differences of two, with intervals that resample prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from trimtab.stats import Interval, bootstrap_ratio_of_sums, bootstrap_statistic, wilson_interval


class Counts(NamedTuple):
    """Per prompt, over its samples."""

    found: NDArray[np.float64]
    """Fluent texts in which the concept is found, [P]."""
    fluent: NDArray[np.float64]
    """Fluent texts, [P]."""

    @classmethod
    def of(cls, has: Bool[NDArray[np.bool_], "P S"], fluent: Bool[NDArray[np.bool_], "P S"]) -> Counts:
        """Counts of texts of which it is known whether they have a concept."""
        return cls((has & fluent).sum(axis=1).astype(float), fluent.sum(axis=1).astype(float))

    @property
    def rate(self) -> float:
        """Share of the fluent texts that have the concept; NaN if there is none."""
        return float(self.found.sum() / self.fluent.sum()) if self.fluent.any() else math.nan


def rate(counts: Counts, seed: int = 0) -> Interval | None:
    """The rate; None without a fluent text.

    Where all prompts agree a bootstrap knows no spread; then, and with one text a prompt, the interval is Wilson's over
    prompts.
    """
    some = counts.fluent > 0
    found, fluent = counts.found[some], counts.fluent[some]
    if not len(fluent):
        return None
    if fluent.max() == 1 or counts.rate in (0.0, 1.0):
        return wilson_interval(counts.rate * len(fluent), len(fluent))
    return bootstrap_ratio_of_sums(found, fluent, seed=seed)


def fluency(fluent: NDArray[np.float64], texts: int, seed: int = 0) -> Interval:
    """Share of fluent texts.

    Args:
        fluent: fluent texts of each prompt, [P].
        texts: of each prompt.
        seed: of the bootstrap.
    """
    share = rate(Counts(fluent, np.full_like(fluent, texts)), seed)
    assert share is not None
    return share


def difference(first: Counts, second: Counts, seed: int = 0) -> Interval | None:
    """Rate of the first less that of the second on the same prompts; None if either has no fluent text.

    Prompts are resampled with both sides. Where all agree, so that a bootstrap knows no spread, the bounds are of the
    two rates' Wilson intervals, squared and added (Newcombe 1998, method 10, of rates that do not go together).
    """
    return mean_difference([(first, second)], seed)


def mean_difference(pairs: Sequence[tuple[Counts, Counts]], seed: int = 0) -> Interval | None:
    """Mean over pairs, which have the same prompts, of what `difference` gives; None if one of them has none."""
    if not pairs or any(math.isnan(side.rate) for pair in pairs for side in pair):
        return None
    counts = np.stack([np.stack([*first, *second], axis=1) for first, second in pairs], axis=2)  # [P, 4, pairs]

    def statistic(picked: NDArray[np.float64]) -> float:
        found, fluent, found_second, fluent_second = picked.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return float((found / fluent - found_second / fluent_second).mean())

    interval = bootstrap_statistic(statistic, [counts], seed=seed)
    if interval.high > interval.low or len(counts) < 2:
        return interval
    up, down = 0.0, 0.0
    for sides in pairs:
        first, second = (rate(side, seed) for side in sides)
        assert first is not None
        assert second is not None
        up += math.hypot(first.high - first.estimate, second.estimate - second.low)
        down += math.hypot(first.estimate - first.low, second.high - second.estimate)
    n = len(pairs)
    return Interval(
        estimate=interval.estimate,
        low=max(-1.0, interval.estimate - down / n),
        high=min(1.0, interval.estimate + up / n),
        n=interval.n,
        method="wilson",
    )


def mean_rate(counts: Sequence[Counts], seed: int = 0) -> Interval | None:
    """Mean over concepts of their rates on the same prompts; None if one of them has no fluent text."""
    if not counts or any(math.isnan(one.rate) for one in counts):
        return None
    if len(counts) == 1:
        return rate(counts[0], seed)
    both = np.stack([np.stack(one, axis=1) for one in counts], axis=2)  # [P, 2, concepts]

    def statistic(picked: NDArray[np.float64]) -> float:
        found, fluent = picked.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return float((found / fluent).mean())

    interval = bootstrap_statistic(statistic, [both], seed=seed)
    if interval.high > interval.low or len(both) < 2:
        return interval
    each = [one for one in (rate(one, seed) for one in counts) if one is not None]
    low, high = (float(np.mean([getattr(one, name) for one in each])) for name in ("low", "high"))
    return Interval(estimate=interval.estimate, low=low, high=high, n=interval.n, method="wilson")
