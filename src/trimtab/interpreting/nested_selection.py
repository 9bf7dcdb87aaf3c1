"""Whether a criterion finds features that steer better, reported on features and instructions that chose nothing.

A criterion orders features; which end of the order, how many of them and which dose are still free. Papers keep, for
each SAE, the subset with the best score *by the score that they report* (arXiv 2510.03659), which lifts any order, a
random one included. Here both are computed: that rule, and one in which direction and size are chosen on one half of
the features and on some instructions, and reported on the other half and the other instructions (then the halves
change places). How much of the first is winner's curse is the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimtab.errors import UserError
from trimtab.runs.results import Result
from trimtab.runs.tables import INTERVAL, SIGNED, Column, Table
from trimtab.stats import Interval, student_mean
from trimtab.stats.distributions import student_quantile
from trimtab.stats.resamples import column_mean

Floats = NDArray[np.float64]
RANDOM = "random"
"""The criterion that knows nothing."""
DIRECTIONS = ("UP", "DOWN")
"""Features with the highest scores, and those with the lowest."""
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Sizes of subsets that are tried, as shares of the features."""
FEWEST = 8
"""Features that can be halved, with something to choose in each half."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What chance makes of a number: its mean and its central 95%."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Floats) -> Spread:
        low, high = np.quantile(values, [0.025, 0.975])
        return cls(mean=float(values.mean()), low=float(low), high=float(high))

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True, kw_only=True)
class Subset:
    """The features at one end of a ranking."""

    direction: str
    """UP or DOWN."""
    share: float
    """Of the features."""
    size: int

    def __str__(self) -> str:
        return f"{self.size} {self.direction}"


@dataclass(frozen=True, kw_only=True)
class CriterionLift:
    """What choosing features by a criterion adds to their utility, over all features at their doses."""

    criterion: str
    chosen: tuple[Subset, ...]
    """On each half, for the other."""
    score: float
    """Utility of the features so chosen, where nothing was chosen."""
    lift: Interval
    """Of it over the mean of all features there, which is what random subsets have on average."""
    p_value: float
    """Share of random rankings that are lifted as much by the same procedure."""
    random: Spread
    """Lift of random subsets of the same sizes."""
    kept: Subset
    """The best of all subsets by what is reported."""
    kept_score: float
    kept_lift: float
    """As published: without bounds, which it cannot have, as it was chosen by itself."""
    random_kept: Spread
    """Lift that the same rule gives to random rankings."""
    curse: Interval
    """What keeping the best adds to the lift over choosing where nothing is reported; bounds are given the choices."""


@dataclass(frozen=True, kw_only=True)
class PairedLift:
    """How much more utility one criterion finds than another, on the same features."""

    criterion: str
    over: str
    difference: Interval


@dataclass(frozen=True, kw_only=True, repr=False)
class NestedSelection(Result):
    """Lifts of criteria, honestly and by keeping the best. Intervals are over features, of the same instructions."""

    base: Interval
    """Utility of all features, each at the dose that was chosen for it."""
    criteria: tuple[CriterionLift, ...]
    pairs: tuple[PairedLift, ...]
    features: int
    gaps: int
    """Features that were left out, because no dose of them was judged both for choosing and for reporting."""

    def headline(self) -> str:
        # A random criterion is what others are held against.
        others = [one for one in self.criteria if one.criterion != RANDOM] or self.criteria
        best = max(others, key=lambda one: one.lift.estimate)
        gaps = f", {self.gaps} left out for want of judgements" * bool(self.gaps)
        return (
            f"of {self.features} features (utility {self.base:.3f}{gaps}) {best.criterion} finds those that steer"
            f" better by {best.lift:+.3f} (random subsets {best.random.mean:+.3f}); keeping the best says"
            f" {best.kept_lift:+.3f} (random rankings {best.random_kept.mean:+.3f})"
        )

    def tables(self) -> dict[str, Table]:
        lifts = [
            Column("criterion", "criterion"),
            Column("chosen", lambda one: ", ".join(map(str, one.chosen)), note="features, for the other half"),
            Column("lift", "lift", SIGNED, note="chosen elsewhere"),
            Column("p", "p_value", ".3f", note="against random rankings"),
            Column("random subsets", lambda one: str(one.random), spare=1),
            Column("kept", lambda one: str(one.kept), spare=2),
            Column("lift, best kept", "kept_lift", SIGNED),
            Column("random, best kept", lambda one: str(one.random_kept), note="mean, central 95%"),
            Column("winner's curse", "curse", SIGNED),
        ]
        pairs = [
            Column("criterion", "criterion"),
            Column("over", "over"),
            Column("difference", "difference", SIGNED),
        ]
        base = [Column("features", "features", ",d"), Column("utility of all", "base", INTERVAL)]
        caption = "Utility of chosen features less that of all. Intervals and chance are over features."
        return {
            "lifts": Table(columns=lifts, rows=self.criteria, caption=caption),
            "pairs": Table(columns=pairs, rows=self.pairs, caption="On the same features, chosen elsewhere."),
            "all features": Table(columns=base, rows=[self]),
        }


def select_nested(
    utility: ArrayLike,
    rankings: Mapping[str, ArrayLike],
    choosing: ArrayLike,
    *,
    shares: Sequence[float] = SHARES,
    n_random: int = 2000,
    seed: int = 0,
) -> NestedSelection:
    """Choose features by criteria, and report what that gains.

    Each feature's dose is the one with the best mean over the instructions to choose on (AxBench's rule); what is
    reported is its mean over the others.

    Args:
        utility: `[F, D, I]`, or with further axes, which are averaged: of each feature at each dose on each
            instruction. NaN where nothing was judged.
        rankings: scores `[F]` by criterion; both ends of each are tried.
        choosing: `[I]` booleans, the instructions to choose on; the others report.
        shares: sizes of subsets to try.
        n_random: random rankings that go through the same procedures.
        seed: of them, and of which features are in which half.

    Raises:
        UserError: shapes do not fit, scores are not finite, or there are too few features or instructions.

    Source: the rule that keeps the best is that of arXiv 2510.03659; doses are chosen as in AxBench (arXiv 2501.17148).
    """
    chosen_by, reported = _doses_chosen(np.asarray(utility, dtype=np.float64), np.asarray(choosing, dtype=bool))
    scores = _scores(rankings, len(reported))
    judged = np.isfinite(chosen_by) & np.isfinite(reported)
    first, u, names = chosen_by[judged], reported[judged], list(rankings)
    if len(u) < FEWEST:
        raise UserError(f"{len(u)} features that were judged", f"{FEWEST} are needed to choose some", "steer more")
    if not shares or not all(0 < share < 1 for share in shares):
        raise UserError(f"shares {list(shares)}", "a subset is a share between 0 and 1", "give some like 0.1 0.3")
    rng = np.random.default_rng(seed)
    halves = np.array_split(rng.permutation(len(u)), 2)
    everything = np.concatenate([scores[:, judged], rng.random((n_random, len(u)))])
    kept = _best(everything, u, shares)
    kept_lift = kept.value - u.mean()
    folds = [_fold(everything, first, u, other, half, shares) for other, half in (halves, halves[::-1])]
    lift = np.mean([fold.lift for fold in folds], axis=0)
    orders = np.argsort(rng.random((n_random, len(u))), axis=1)
    kept_weights = kept.weights(everything)
    found: list[CriterionLift] = []
    for i, name in enumerate(names):
        weights = [fold.weights[i] for fold in folds]
        random = np.mean(
            [
                _means_of_first(u[half], orders, half, int((w > 0).sum())) - u[half].mean()
                for w, half in zip(weights, halves[::-1], strict=True)
            ],
            axis=0,
        )
        found.append(
            CriterionLift(
                criterion=name,
                chosen=tuple(fold.chosen.subset(i) for fold in folds),
                score=float(np.mean([fold.score[i] for fold in folds])),
                lift=_halved([_contrast(u[h], w) for w, h in zip(weights, halves[::-1], strict=True)]),
                p_value=float((1 + (lift[len(names) :] >= lift[i] - 1e-12).sum()) / (1 + n_random)),
                random=Spread.of(random),
                kept=kept.subset(i),
                kept_score=float(kept.value[i]),
                kept_lift=float(kept_lift[i]),
                random_kept=Spread.of(kept_lift[len(names) :]),
                curse=_halved(
                    [_contrast(u[h], 2 * kept_weights[i][h], w) for w, h in zip(weights, halves[::-1], strict=True)]
                ),
            )
        )
    pairs = [
        PairedLift(
            criterion=names[a], over=names[b],
            difference=_halved(
                [_contrast(u[h], f.weights[a], f.weights[b]) for f, h in zip(folds, halves[::-1], strict=True)]
            ),
        )
        for a, b in combinations(range(len(names)), 2)
    ]  # fmt: skip
    return NestedSelection(
        base=student_mean(u), criteria=tuple(found), pairs=tuple(pairs), features=len(u), gaps=int((~judged).sum())
    )


def _doses_chosen(utility: Floats, choosing: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """What chooses and what reports, `[F]` each, at each feature's dose; NaN where there is neither."""
    if utility.ndim < 3 or choosing.shape != utility.shape[2:3]:
        raise UserError(
            f"utility of shape {utility.shape} and choosing of shape {choosing.shape}",
            "they are [features, doses, instructions, …] and [instructions]", "give both for the same instructions",
        )  # fmt: skip
    if choosing.all() or not choosing.any():
        raise UserError("the instructions", "all of them choose, or all report", "keep some for each")
    by_instruction = column_mean(utility.reshape(*utility.shape[:3], -1))
    chooses, reports = (column_mean(by_instruction[:, :, part]) for part in (choosing, ~choosing))
    dose, _ = best_dose(chooses)
    rows = np.arange(len(dose))
    return chooses[rows, dose], reports[rows, dose]


def best_dose(means: Floats) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Places `[F]` of the doses of the highest mean, and whether anything says so.

    Args:
        means: `[F, D]` over the instructions to choose on, NaN where nothing was judged.
    """
    known = np.isfinite(means)
    return np.where(known, means, -np.inf).argmax(axis=1), np.asarray(known.any(axis=1))


def _scores(rankings: Mapping[str, ArrayLike], n: int) -> Floats:
    if not rankings:
        raise UserError("the rankings", "there is none", "give scores of a criterion")
    scores = [np.asarray(each, dtype=np.float64) for each in rankings.values()]
    for name, each in zip(rankings, scores, strict=True):
        if each.shape != (n,) or not np.isfinite(each).all():
            raise UserError(
                f"scores of {name}", f"{n} finite numbers are needed, one for each feature", "score all features"
            )
    return np.stack(scores)


class _Chosen(NamedTuple):
    """Of each of R rankings the subset with the highest mean of some values."""

    down: NDArray[np.bool_]  # [R]
    size: NDArray[np.int64]  # [R]
    share: Floats  # [R]
    value: Floats  # [R] its mean

    def subset(self, i: int) -> Subset:
        return Subset(direction=DIRECTIONS[int(self.down[i])], share=float(self.share[i]), size=int(self.size[i]))

    def weights(self, scores: Floats, size: NDArray[np.int64] | None = None) -> Floats:
        """`[R, F]` 1/size at the features of the subset, by scores `[R, F]` of these or of other features."""
        size = self.size if size is None else size
        best_first = np.argsort(np.where(self.down[:, None], scores, -scores), axis=1, kind="stable")
        place = np.argsort(best_first, axis=1, kind="stable")
        return (place < size[:, None]) / size[:, None]


def _size(share: float | Floats, n: int) -> NDArray[np.int64]:
    """Features of a share: at least one, and not all."""
    return np.clip(np.rint(np.asarray(share) * n).astype(np.int64), 1, n - 1)


def _best(scores: Floats, values: Floats, shares: Sequence[float]) -> _Chosen:
    """The subset of each ranking `[R, F]` with the highest mean of values `[F]`."""
    n = len(values)
    tried = list(product((False, True), shares))
    means = np.empty((len(scores), len(tried)))
    for down in (False, True):
        ranked = values[np.argsort(scores if down else -scores, axis=1, kind="stable")].cumsum(axis=1)
        for column, (end, share) in enumerate(tried):
            if end == down:
                size = int(_size(share, n))
                means[:, column] = ranked[:, size - 1] / size
    best = means.argmax(axis=1)
    share = np.array([share for _, share in tried])[best]
    return _Chosen(np.array([end for end, _ in tried])[best], _size(share, n), share, means.max(axis=1))


class _Fold(NamedTuple):
    """What was chosen on one half, and what it comes to on the other."""

    chosen: _Chosen
    weights: Floats  # [R, half]
    score: Floats  # [R]
    lift: Floats  # [R]


def _fold(
    scores: Floats, first: Floats, u: Floats, other: NDArray[np.int64], half: NDArray[np.int64], shares: Sequence[float]
) -> _Fold:
    """Choose on the other half by what chooses, and report on this one by what reports."""
    chosen = _best(scores[:, other], first[other], shares)
    weights = chosen.weights(scores[:, half], _size(chosen.share, len(half)))
    score = weights @ u[half]
    return _Fold(chosen, weights, score, score - u[half].mean())


def _means_of_first(values: Floats, orders: NDArray[np.int64], half: NDArray[np.int64], size: int) -> Floats:
    """Means of random subsets of a half: its first features in each of R orders of all."""
    place = np.argsort(orders, axis=1)[:, half]
    return values[np.argsort(place, axis=1)[:, :size]].mean(axis=1)


def _contrast(u: Floats, weights: Floats, other: Floats | None = None) -> Interval:
    """A weighted mean of features less another, by default the plain mean, with Student's interval over features.

    The spread of features is that around the mean of each of the groups that weights make, pooled; a subset of two
    features could not say how widely features of its kind differ.
    """
    n = len(u)
    against = np.full(n, 1 / n) if other is None else other
    c = weights - against
    groups = np.column_stack([np.ones(n), weights > 0, against > 0])
    fitted = np.linalg.lstsq(groups, u, rcond=None)[0]
    rank = int(np.linalg.matrix_rank(groups))
    estimate, half_width = float(c @ u), math.nan
    if n > rank:
        spread = math.sqrt(float(((u - groups @ fitted) ** 2).sum()) / (n - rank))
        half_width = student_quantile(0.975, n - rank) * spread * math.sqrt(float(c @ c))
    return Interval(estimate=estimate, low=estimate - half_width, high=estimate + half_width, n=n, method="student")


def _halved(parts: Sequence[Interval]) -> Interval:
    """The mean over both halves, whose errors go together, as what is reported on one chose for the other.

    Where only the direction is chosen, the reports are sign(b)·a and sign(a)·b of the halves' lifts a and b. With no
    true lift both are normal around 0, and the reports correlate by 2/π; that is taken for all choices.
    """
    estimate = float(np.mean([part.estimate for part in parts]))
    reach = np.array([part.high - part.estimate for part in parts])
    together = np.full((len(parts), len(parts)), 2 / math.pi)
    np.fill_diagonal(together, 1)
    half_width = math.sqrt(float(reach @ together @ reach)) / len(parts)
    n = sum(part.n for part in parts)
    return Interval(estimate=estimate, low=estimate - half_width, high=estimate + half_width, n=n, method="student")


@dataclass(frozen=True, kw_only=True)
class MeanLift:
    """A criterion's lifts over several tables, such as SAEs; intervals are over these."""

    criterion: str
    tables: int
    lift: Interval
    kept_lift: Interval
    random_kept: float
    """What keeping the best gives to random rankings."""
    curse: Interval


def mean_lifts(selections: Sequence[NestedSelection]) -> list[MeanLift]:
    """Lifts of criteria over the selections of several SAEs, in which each has the same criteria.

    Raises:
        UserError: there is none, or they have different criteria.
    """
    _check_alike(selections)
    return [
        MeanLift(
            criterion=rows[0].criterion,
            tables=len(rows),
            lift=student_mean([row.lift.estimate for row in rows]),
            kept_lift=student_mean([row.kept_lift for row in rows]),
            random_kept=float(np.mean([row.random_kept.mean for row in rows])),
            curse=student_mean([row.curse.estimate for row in rows]),
        )
        for rows in zip(*(each.criteria for each in selections), strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class MeanPair:
    """How much more one criterion is lifted than another, over several tables; paired."""

    criterion: str
    over: str
    difference: Interval
    """Chosen elsewhere."""
    kept_difference: Interval
    """Where the best is kept."""


def mean_pairs(selections: Sequence[NestedSelection]) -> list[MeanPair]:
    """Differences of any two criteria over the selections of several SAEs, in which each has the same criteria.

    Raises:
        UserError: there is none, or they have different criteria.
    """
    _check_alike(selections)
    kept = [{row.criterion: row.kept_lift for row in each.criteria} for each in selections]
    return [
        MeanPair(
            criterion=pairs[0].criterion,
            over=pairs[0].over,
            difference=student_mean([pair.difference.estimate for pair in pairs]),
            kept_difference=student_mean([one[pairs[0].criterion] - one[pairs[0].over] for one in kept]),
        )
        for pairs in zip(*(each.pairs for each in selections), strict=True)
    ]


def _check_alike(selections: Sequence[NestedSelection]) -> None:
    kinds = {tuple(one.criterion for one in each.criteria) for each in selections}
    if len(kinds) != 1:
        raise UserError("the selections", "there is none, or they have different criteria", "rank by the same ones")
