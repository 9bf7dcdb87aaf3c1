"""One set of bootstrap resamples for many statistics, each a function of weights, so that any two can be compared.

A resample is how often each unit was drawn. What is computed from the weights of the same resamples is paired: a
difference of two statistics has the interval that it would have if it had been resampled itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimtab.errors import UserError
from trimtab.stats.bootstrap import percentile_interval
from trimtab.stats.interval import Interval
from trimtab.stats.samples import FloatArray


@dataclass(frozen=True)
class Resampled:
    """A statistic on the data and on each resample."""

    estimate: float
    draws: FloatArray
    """`[R]`"""
    n: int
    """Units that were resampled."""

    @property
    def interval(self) -> Interval:
        """With 95% bounds, expanded percentiles of the draws that are numbers."""
        return percentile_interval(self.estimate, self.draws, self.n)

    def __sub__(self, other: Resampled) -> Resampled:
        assert self.draws.shape == other.draws.shape
        assert self.n == other.n
        return Resampled(self.estimate - other.estimate, self.draws - other.draws, self.n)

    @staticmethod
    def mean(parts: Sequence[Resampled]) -> Resampled:
        """The mean of several statistics of the same resamples."""
        draws = np.mean([part.draws for part in parts], axis=0)
        return Resampled(float(np.mean([part.estimate for part in parts])), draws, parts[0].n)


class Resamples:
    """Resamples of units, such as prompts; all rows of a unit are drawn together.

    Args:
        unit: `[N]` what each row belongs to, such as the number of its prompt.
        within: `[N]` strata, such as the model of each row's dictionary: each keeps its number of units. One unit fewer
            than a stratum has is drawn from it and weighted up by as much (Rao and Wu 1988): as many as it has would
            spread too little where strata are small. A stratum of one unit joins all others.
        n_resamples: how many.
        seed: of the draws.

    Attributes:
        units: how many different ones there are.
        strata: how many are resampled by themselves; 1 without `within`.
        weights: `[R, N]` how often each row is in each resample.

    Raises:
        UserError: there is no row.
    """

    def __init__(
        self, unit: ArrayLike, *, within: ArrayLike | None = None, n_resamples: int = 1000, seed: int = 0
    ) -> None:
        names: Any = np.unique(np.asarray(unit), return_inverse=True, return_index=True)
        self._of_row: NDArray[np.int64] = names[2]
        self._seed = seed
        self.units = len(names[0])
        if not self.units:
            raise UserError("a bootstrap", "there is nothing to resample", "give at least one prompt")
        rng, self.strata = np.random.default_rng(seed), 1
        if within is None:
            drawn = rng.integers(self.units, size=(n_resamples, self.units))
            counts = np.zeros((n_resamples, self.units))
            np.add.at(counts, (np.arange(n_resamples)[:, None], drawn), 1)
        else:
            stratum = strata_of(np.asarray(within)[names[1]])
            self.strata = int(stratum.max()) + 1
            counts = np.empty((n_resamples, self.units))
            for members in (np.flatnonzero(stratum == one) for one in range(self.strata)):
                n = len(members)
                counts[:, members] = rng.multinomial(n - 1, np.full(n, 1 / n), size=n_resamples) * n / (n - 1)
        self.weights: FloatArray = counts[:, self._of_row]

    def among(self, rows: NDArray[np.bool_]) -> Resamples:
        """The same resamples, of some of the rows alone."""
        found = copy(self)
        found.weights, found._of_row = self.weights[:, rows], self._of_row[rows]
        found.units = len(np.unique(found._of_row))
        return found

    def mean_of_draws(self, parts: Sequence[Resampled]) -> Resampled:
        """The mean of a statistic over D random draws of a control, whose spread is in the interval.

        Each resample draws D of them anew, the same ones for all statistics of so many draws. Deviations from their
        mean count √(D/(D − 1)) times, as D values spread by so much less around their own mean than around the true
        one.

        Args:
            parts: the statistic of each draw, on these resamples.
        """
        n = len(parts)
        picked = np.random.default_rng([self._seed, n]).multinomial(n, np.full(n, 1 / n), size=len(self.weights))
        shares = 1 / n + (picked - 1) / n * np.sqrt(n / max(n - 1, 1))
        draws = (shares * np.stack([part.draws for part in parts], axis=-1)).sum(axis=-1)
        return Resampled(float(np.mean([part.estimate for part in parts])), draws, parts[0].n)

    def of(self, statistic: Callable[[FloatArray], FloatArray]) -> Resampled:
        """A statistic on the data and on all resamples.

        Args:
            statistic: from weights `[R, N]` of the rows to `[R]` values; NaN where a resample has none.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            estimate = float(statistic(np.ones((1, self.weights.shape[1])))[0])
            return Resampled(estimate, statistic(self.weights), self.units)


def strata_of(labels: ArrayLike) -> NDArray[np.int64]:
    """`[N]` numbers of strata from 0; all are one where some label has a single unit, which has no spread by itself."""
    found: Any = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return np.zeros(len(found[1]), dtype=np.int64) if found[2].min() < 2 else found[1]


def ratio(numerator: ArrayLike, denominator: ArrayLike, weights: FloatArray) -> FloatArray:
    """Σ numerator / Σ denominator under each row of weights: a mean per token of sums per document, for example.

    Args:
        numerator, denominator: `[N]`.
        weights: `[R, N]`.
    """
    return (weights @ np.asarray(numerator, dtype=np.float64)) / (weights @ np.asarray(denominator, dtype=np.float64))


def pairs_won(score: FloatArray, positive: NDArray[np.bool_]) -> FloatArray:
    """`[P, M]` whether each positive row scores above each negative one, ½ where they tie."""
    return (1 + np.sign(score[positive][:, None] - score[~positive][None, :])) / 2


def auc(score: ArrayLike, positive: ArrayLike, weights: FloatArray) -> FloatArray:
    """Area under the ROC curve under each row of weights: how often a positive row scores above a negative one.

    Args:
        score: `[N]`.
        positive: `[N]` booleans.
        weights: `[R, N]`.

    Returns:
        `[R]`; ties count ½; NaN where a kind has no weight.
    """
    wanted = np.asarray(positive, dtype=bool)
    pairs = pairs_won(np.asarray(score, dtype=np.float64), wanted)
    p, m = weights[:, wanted], weights[:, ~wanted]
    return np.einsum("rm,rm->r", p @ pairs, m) / (p.sum(axis=1) * m.sum(axis=1))


def balanced(said: NDArray[np.bool_], yes: NDArray[np.bool_], weights: FloatArray) -> FloatArray:
    """Mean of the shares of right decisions on rows of both kinds under each row of weights: 0.5 is chance.

    Args:
        said, yes: `[N]` what was decided, and what is right.
        weights: `[R, N]`.

    Returns:
        `[R]`; NaN where a kind has no weight.
    """
    return (ratio(said & yes, yes, weights) + ratio(~said & ~yes, ~yes, weights)) / 2


def column_mean(values: FloatArray) -> FloatArray:
    """Mean over the last axis of what are numbers; NaN where none is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=-1) / known.sum(axis=-1)
