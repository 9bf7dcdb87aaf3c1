"""Rates of a concept among fluent texts, and differences of two, with intervals that resample prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from trimtab.stats import Interval, Resampled, Resamples, bootstrap_ratio_of_sums, wilson_interval
from trimtab.stats.resamples import ratio


class Counts(NamedTuple):
    """Per prompt, over its samples."""

    found: NDArray[np.float64]
    """Fluent texts in which the concept is found, [P]."""
    fluent: NDArray[np.float64]
    """Fluent texts, [P]."""

    @classmethod
    def of(cls, has: Bool[np.ndarray, "P S"], fluent: Bool[NDArray[np.bool_], "P S"]) -> Counts:
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


def fluency(fluent: Sequence[Bool[np.ndarray, "P S"]], seed: int = 0) -> Interval:
    """Share of fluent texts, over conditions on as many prompts each."""
    whole = np.concatenate(fluent, axis=1)
    share = rate(Counts.of(whole, np.ones_like(whole)), seed)
    assert share is not None
    return share


def mean_rate(counts: Sequence[Counts], seed: int = 0) -> Interval | None:
    """Mean over concepts of their rates on the same prompts; None if one of them has no fluent text."""
    if not counts or any(math.isnan(one.rate) for one in counts):
        return None
    if len(counts) == 1:
        return rate(counts[0], seed)
    interval = _mean(counts, seed).interval
    if interval.high > interval.low:
        return interval
    each = [one for one in (rate(one, seed) for one in counts) if one is not None]
    low, high = (float(np.mean([getattr(one, name) for one in each])) for name in ("low", "high"))
    return Interval(estimate=interval.estimate, low=low, high=high, n=interval.n, method="wilson")


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
    first, second = zip(*pairs, strict=True)
    interval = (_mean(first, seed) - _mean(second, seed)).interval
    if interval.high > interval.low:
        return interval
    up, down = 0.0, 0.0
    for sides in pairs:
        one, other = (rate(side, seed) for side in sides)
        assert one is not None
        assert other is not None
        up += math.hypot(one.high - one.estimate, other.estimate - other.low)
        down += math.hypot(one.estimate - one.low, other.high - other.estimate)
    n = len(pairs)
    return Interval(
        estimate=interval.estimate,
        low=max(-1.0, interval.estimate - down / n),
        high=min(1.0, interval.estimate + up / n),
        n=interval.n,
        method="wilson",
    )


def _mean(counts: Sequence[Counts], seed: int) -> Resampled:
    """Mean of several rates, on resamples that are the same for as many prompts."""
    resamples = Resamples(range(len(counts[0].found)), seed=seed)
    return Resampled.mean([resamples.of(partial(ratio, one.found, one.fluent)) for one in counts])
