"""Kendall's rank correlation τ_b: under resamples, under permutations, given other scores, and how high it can be.

τ_b of n units is a cosine: of two vectors that hold, for each pair of units, the sign of the difference of their
scores (Kendall 1945). So a resample is a weight of each pair, and a unit that is drawn twice is left out as a tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimtab.errors import UserError
from trimtab.stats.bootstrap import percentile_interval
from trimtab.stats.interval import Interval
from trimtab.stats.resamples import Resampled, Resamples, strata_of
from trimtab.stats.samples import FloatArray

LEAST_UNITS = 5
"""Fewer cannot be ranked to any purpose."""
LEAST_FOR_BOUNDS = 8
"""Resamples of fewer are mostly ties: with scores of few levels 95% intervals of 5 or 6 units held τ in 63 to 91%."""
_BLOCK = 4_000_000
"""Signs at once."""


class PermutationTest(NamedTuple):
    """How a τ stands among those of shuffled units."""

    p: float
    """Two-sided: the share of shuffles, the data among them, at least as far from the shuffles' mean."""
    expected: float
    """Mean of the shuffles: what is left of τ without any association within strata."""
    spread: float
    """Standard deviation of the shuffles: the standard error of τ where there is no association."""


class RankScores:
    """Scores of the same units, and how far they rank them alike.

    All statistics share one set of resamples, so that differences are paired, and one set of shuffles.

    Args:
        scores: `[N]` by name.
        within: `[N]` strata, such as models: units are resampled and shuffled within them. One stratum by default.
        same_stratum: compare only units of the same stratum, so that differences between strata count for nothing.
        n_resamples: of the bootstrap, and shuffles.
        seed: of both.

    Raises:
        UserError: fewer than five units, scores of other lengths, that are not finite, or that are all equal.
    """

    def __init__(
        self,
        scores: Mapping[str, ArrayLike],
        *,
        within: ArrayLike | None = None,
        same_stratum: bool = False,
        n_resamples: int = 10_000,
        seed: int = 0,
    ) -> None:
        self.scores = {name: _checked(name, values) for name, values in scores.items()}
        sizes = [len(values) for values in self.scores.values()]
        sizes += [] if within is None else [np.size(within)]
        if len(set(sizes)) != 1:
            raise UserError(f"scores of {sorted(set(sizes))} units", "each unit needs every score", "give all of them")
        self.n = sizes[0]
        stratum = np.zeros(self.n, dtype=np.int64) if within is None else strata_of(within)
        self._stratum: NDArray[np.int64] = stratum
        same = self._stratum[:, None] == self._stratum[None, :]
        self._compared = (same if same_stratum else np.ones_like(same)).astype(np.float64)
        self._n_resamples, self._seed = n_resamples, seed
        self._forms: dict[tuple[str, str], Resampled] = {}

    @cached_property
    def resamples(self) -> Resamples:
        """Of units, within strata."""
        return Resamples(np.arange(self.n), within=self._stratum, n_resamples=self._n_resamples, seed=self._seed)

    def tau(self, x: str, y: str, given: Sequence[str] = ()) -> Resampled:
        """τ_b of two scores, or Kendall's partial τ given others, on the data and on each resample; NaN where one of
        the scores ties on all pairs.

        Args:
            x, y: names of scores.
            given: names of scores that both may owe their agreement to. τ_xy·z = (τ_xy − τ_xz τ_yz) /
                √((1 − τ_xz²)(1 − τ_yz²)) (Kendall 1942), one after the other. It is not 0 where x and y are
                independent given z (Korn 1984): a permutation test's `expected` says what it is there.
        """

        def part(form: Callable[[Resampled], FloatArray]) -> FloatArray:
            def plain(a: str, b: str) -> FloatArray:
                return form(self._form(a, b)) / np.sqrt(form(self._form(a, a)) * form(self._form(b, b)))

            with np.errstate(divide="ignore", invalid="ignore"):
                return _partial(plain, x, y, tuple(given))

        return Resampled(float(part(lambda f: np.asarray([f.estimate]))[0]), part(lambda f: f.draws), self.n)

    def _form(self, a: str, b: str) -> Resampled:
        """Σ_ij w_i w_j sign(a_i − a_j) sign(b_i − b_j) over the pairs that are compared; (a, a) counts untied ones."""
        if (a, b) not in self._forms:
            signs = _signs(self.scores[a]) * _signs(self.scores[b]) * self._compared
            self._forms[a, b] = self._forms[b, a] = self.resamples.of(lambda w: ((w @ signs) * w).sum(axis=1))
        return self._forms[a, b]

    def interval(self, found: Resampled, level: float = 0.95) -> Interval:
        """Of a statistic of the resamples: expanded percentiles, with a degree of freedom less for each stratum.

        There are no bounds (NaN) of fewer than eight units, and where resamples do not differ, such as at τ = 1: they
        say nothing about what other units would give.
        """
        freedom = max(self.n - self.resamples.strata, 1)
        interval = percentile_interval(found.estimate, found.draws, self.n, level, df=freedom)
        known = self.n >= LEAST_FOR_BOUNDS and interval.high - interval.low > 1e-12
        return interval if known else replace(interval, low=math.nan, high=math.nan)

    def least_bound(self, found: Resampled) -> float:
        """The smallest d for which |τ| < d is shown at 5%, by two one-sided tests (Schuirmann 1987): both bounds of the
        90% interval lie within ±d. Whoever claims that τ vanishes claims this d."""
        interval = self.interval(found, 0.9)
        return max(abs(interval.low), abs(interval.high))

    def permutation_tests(self, x: str, others: Sequence[str], given: Sequence[str] = ()) -> list[PermutationTest]:
        """Tests of whether a score is independent of each of some others within strata, and given yet others.

        The ranks of x are shuffled within strata, the same way for all tests. Given other scores, what is shuffled is
        what a linear fit of their ranks leaves of x's (Freedman and Lane 1983), so that x keeps what it has of them.
        Strata that differ in both scores make τ differ from 0 even when shuffled, so that what counts is the distance
        from the shuffles' mean.

        Args:
            x: name of the score that is shuffled.
            others: names of those it is compared with.
            given: as in `tau`.
        """
        rows = self._shuffled(x, tuple(given))
        names = [*others, *given]
        taus = dict(zip(names, self.taus_of_rows(rows, names).T, strict=True))

        def plain(a: str, b: str) -> FloatArray:
            return taus[b] if a == x else np.full(len(rows), self.tau(a, b).estimate)

        found: list[PermutationTest] = []
        for y in others:
            with np.errstate(divide="ignore", invalid="ignore"):
                shuffled = _partial(plain, x, y, tuple(given))
            values: FloatArray = shuffled[np.isfinite(shuffled)]
            apart: FloatArray = np.abs(values - float(values.mean()))
            p = float((apart >= apart[0] - 1e-12).mean())
            found.append(PermutationTest(p, float(values.mean()), float(values.std())))
        return found

    def _shuffled(self, x: str, given: Sequence[str]) -> FloatArray:
        """`[1 + R, N]` the ranks of a score as they are, and shuffled within strata."""
        ranks = np.stack([_ranks(self.scores[name]) for name in (x, *given)])
        of_stratum = np.eye(int(self._stratum.max()) + 1)[self._stratum].T
        design: FloatArray = np.concatenate([of_stratum, ranks[1:]]).T
        fitted: FloatArray = design @ (np.linalg.pinv(design) @ ranks[0])
        # Rounded, so that ties stay ties.
        left: FloatArray = (ranks[0] - fitted)[self.shuffles]
        return np.round(fitted + left, 4)

    @cached_property
    def shuffles(self) -> NDArray[np.int64]:
        """`[1 + R, N]` units in place of units, of the same stratum; the first are in their own places."""
        rng = np.random.default_rng([self._seed, 1])
        found = np.tile(np.arange(self.n), (self._n_resamples + 1, 1))
        for stratum in range(self._stratum.max() + 1):
            members = np.flatnonzero(self._stratum == stratum)
            found[1:, members] = rng.permuted(found[1:, members], axis=1)
        return found

    def taus_of_rows(self, rows: FloatArray, names: Sequence[str]) -> FloatArray:
        """τ_b of other scores of the units with those that have a name.

        Args:
            rows: `[R, N]`.
            names: K of them.

        Returns:
            `[R, K]`.
        """
        one, other = np.tril_indices(self.n, -1)
        kept = self._compared[one, other] > 0
        one, other = one[kept], other[kept]
        fixed = np.stack([self.scores[name] for name in names])
        signs = np.sign(fixed[:, one] - fixed[:, other]).T.astype(np.float32)  # sums of signs are exact
        found = np.empty((len(rows), len(names)))
        step = max(1, _BLOCK // max(len(one), 1))
        for start in range(0, len(rows), step):
            block = rows[start : start + step].astype(np.float32)
            found_signs = np.sign(block.take(one, axis=1) - block.take(other, axis=1))
            untied = np.count_nonzero(found_signs, axis=1)[:, None] * np.count_nonzero(signs, axis=0)[None, :]
            with np.errstate(divide="ignore", invalid="ignore"):
                found[start : start + step] = found_signs @ signs / np.sqrt(untied)
        return found


def highest_tau(x_halves: FloatArray, y_halves: FloatArray) -> FloatArray:
    """The τ of two scores that rank units by the same truth, from how far two halves of each score agree.

    A score that is the mean of two halves is more reliable than they are. Spearman and Brown's formula says how much
    for Pearson's r and not for τ, so that it goes through the normal distribution: r = sin(πτ/2) (Greiner 1909),
    2r/(1 + r) for both halves together, √ of the product for the two scores, and back by τ = 2/π · asin r.
    It supposes scores that are jointly normal after a monotone change of each; halves that disagree give 0.

    Args:
        x_halves: τ of the halves of the one score.
        y_halves: of the other.
    """

    def reliability(halves: FloatArray) -> FloatArray:
        r = np.maximum(np.sin(np.pi / 2 * halves), 0)
        return 2 * r / (1 + r)

    return 2 / np.pi * np.arcsin(np.sqrt(reliability(x_halves) * reliability(y_halves)))


def _partial(tau: Callable[[str, str], FloatArray], x: str, y: str, given: tuple[str, ...]) -> FloatArray:
    """τ of two given others, from τ of any two."""
    if not given:
        return tau(x, y)
    *before, z = given
    xy, xz, yz = (_partial(tau, a, b, tuple(before)) for a, b in ((x, y), (x, z), (y, z)))
    return (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))


def _signs(values: FloatArray) -> FloatArray:
    """`[N, N]` of the differences of all pairs."""
    return np.sign(values[:, None] - values[None, :])


def _ranks(values: FloatArray) -> FloatArray:
    """From 0, ties at their mean."""
    return (values[:, None] > values[None, :]).sum(axis=1) + ((values[:, None] == values[None, :]).sum(axis=1) - 1) / 2


def _checked(name: str, values: ArrayLike) -> FloatArray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) < LEAST_UNITS:
        raise UserError(f"{name} of {len(found)} units", f"ranks need at least {LEAST_UNITS}", "score more of them")
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found)).sum())
        raise UserError(name, f"{bad} of {len(found)} values are not finite", "leave those units out and say so")
    if (found == found[0]).all():
        raise UserError(name, f"all {len(found)} values are {found[0]:g}", "equal scores cannot be ranked")
    return found
