"""Bootstrap intervals over prompts or documents, with seeds kept inside the prompt they belong to.

Bounds are expanded percentiles (Hesterberg, "What teachers should know about the bootstrap", 2015,
section 3.3): the plain percentile interval of a mean of n values is too narrow by sqrt((n-1)/n) and
by the normal's tails against Student's, so the tail probability is moved to
Phi(sqrt(n/(n-1)) * t_{n-1, alpha/2}). The interval stays as skewed as the data.

Resamples of two to six values cannot leave their range, which holds the mean of three in 75% of cases, not in 95. There
bounds are Student's, estimate ± t_{n-1} sqrt(n/(n-1)) times the resamples' standard deviation: for a mean, t s/sqrt(n).
They may leave the range of what is possible (a share above 1); `Interval.within` cuts them to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimtab.errors import UserError
from trimtab.stats.distributions import normal_cdf, student_quantile
from trimtab.stats.interval import Interval
from trimtab.stats.samples import FloatArray, IntArray, as_sample, per_prompt, same_length

FEWEST = 7
"""Units from which percentiles are taken; of fewer, Student's interval."""
_BLOCK = 2_000_000
"""Indices drawn at once: bounds the memory without changing the draws."""


def bootstrap_mean(
    values: ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean with an interval that resamples prompts.

    Args:
        values: `[P]`, or `[S, P]` with one row per seed: every prompt drew its own seeds (sampled continuations),
            and a resampled prompt brings all of them along, which is what makes the variance right (Davison and
            Hinkley, "Bootstrap methods and their application", 1997, section 3.8). Repetitions that all prompts
            share, such as trainings, are `crossed_mean`'s.
        level: confidence level.
        n_resamples: number of bootstrap samples.
        seed: seed of the resampling.

    Raises:
        UserError: empty or non-finite values.
    """
    sample = per_prompt(as_sample(values))
    draws = _means(sample, n_resamples, np.random.default_rng(seed))
    return percentile_interval(float(sample.mean()), draws, sample.size, level)


def bootstrap_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    paired: bool = True,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """mean(a) − mean(b) with an interval that resamples prompts.

    Args:
        a, b: `[P]` or `[S, P]`. Paired: the same prompts in the same order.
        paired: resample the differences; otherwise the two samples are resampled independently.
        n_resamples, seed: as in `bootstrap_mean`.

    Raises:
        UserError: empty or non-finite values, or paired samples that do not match.
    """
    sample_a, sample_b = as_sample(a, "a"), as_sample(b, "b")
    if paired:
        same_length(sample_a, sample_b)
        equal = sample_a.shape == sample_b.shape
        difference = sample_a - sample_b if equal else per_prompt(sample_a) - per_prompt(sample_b)
        return bootstrap_mean(difference, n_resamples=n_resamples, seed=seed)
    means_a, means_b = per_prompt(sample_a), per_prompt(sample_b)
    rng = np.random.default_rng(seed)
    draws = _means(means_a, n_resamples, rng) - _means(means_b, n_resamples, rng)
    n_least = min(means_a.size, means_b.size)
    df = _welch_df(means_a, means_b)
    return percentile_interval(float(means_a.mean() - means_b.mean()), draws, n_least, df=df)


def bootstrap_ratio_of_sums(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    transform: Callable[[FloatArray], FloatArray] | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Σ numerator / Σ denominator over documents, with an interval that resamples documents.

    Explained variance over documents is `bootstrap_ratio_of_sums(residual, total, transform=lambda r: 1 - r)`
    with each document's sums of squares.

    Args:
        numerator, denominator: `[P]`, one sum per document.
        transform: applied elementwise to the ratio, in the estimate and in every resample.
        n_resamples, seed: as in `bootstrap_mean`.

    Raises:
        UserError: empty, non-finite or unmatched values, or denominators that sum to zero.
    """
    top, bottom = per_prompt(as_sample(numerator, "numerator")), per_prompt(as_sample(denominator, "denominator"))
    same_length(top, bottom)
    if bottom.sum() == 0:
        raise UserError("ratio of sums", "the denominators sum to zero")
    change: Callable[[FloatArray], FloatArray] = transform or (lambda ratio: ratio)
    rng = np.random.default_rng(seed)
    draws = np.empty(n_resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        for block, picks in _resamples(top.size, n_resamples, rng):
            draws[block] = change(top[picks].sum(axis=1) / bottom[picks].sum(axis=1))
    estimate = float(change(np.asarray([top.sum() / bottom.sum()]))[0])
    return percentile_interval(estimate, draws, top.size)


def bootstrap_statistic(
    statistic: Callable[..., float],
    arrays: Sequence[NDArray[Any]],
    *,
    groups: ArrayLike | None = None,
    n_resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Any statistic with an interval that resamples whole groups.

    Args:
        statistic: called as `statistic(*arrays)` on the data and on every resample; resamples for which
            it gives NaN are left out.
        arrays: arrays with equal first axis `[N, ...]`; their rows are resampled together.
        groups: `[N]` labels of the independent units (document or prompt of every row); None if each row
            is one. Rows of a group stay together, so tokens of one document never count as independent.
        n_resamples, seed: as in `bootstrap_mean`.

    Raises:
        UserError: no rows, or arrays and groups of unequal length.
    """
    lengths = {len(array) for array in arrays} | (set[int]() if groups is None else {np.asarray(groups).size})
    if len(lengths) != 1 or 0 in lengths:
        raise UserError(f"arrays and groups of lengths {sorted(lengths)}", "they need one non-zero length")
    n_rows = lengths.pop()
    labels = np.arange(n_rows) if groups is None else np.asarray(groups)
    _, group_of_row, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    rows_by_group = np.argsort(group_of_row, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rng = np.random.default_rng(seed)
    draws = np.empty(n_resamples)
    for i in range(n_resamples):
        picked = rng.integers(sizes.size, size=sizes.size)
        rows = rows_by_group[_runs(starts[picked], sizes[picked])]
        draws[i] = statistic(*(array[rows] for array in arrays))
    return percentile_interval(float(statistic(*arrays)), draws, int(sizes.size))


def _runs(starts: IntArray, sizes: IntArray) -> IntArray:
    """The integers of all runs [start, start + size), one run after the other."""
    ends = np.cumsum(sizes)
    shift: IntArray = np.repeat(starts - (ends - sizes), sizes)
    return np.arange(shift.size) + shift


def _resamples(n: int, n_resamples: int, rng: np.random.Generator) -> Iterator[tuple[slice, IntArray]]:
    """Blocks of indices `[b, n]`, with the resamples that they belong to."""
    step = max(1, _BLOCK // n)
    for start in range(0, n_resamples, step):
        stop = min(start + step, n_resamples)
        yield slice(start, stop), rng.integers(n, size=(stop - start, n))


def _means(sample: FloatArray, n_resamples: int, rng: np.random.Generator) -> FloatArray:
    draws = np.empty(n_resamples)
    for block, picks in _resamples(sample.size, n_resamples, rng):
        draws[block] = sample[picks].mean(axis=1)
    return draws


def _welch_df(a: FloatArray, b: FloatArray) -> float:
    """Degrees of freedom of the difference of two means (Welch and Satterthwaite)."""
    if min(a.size, b.size) < 2:
        return 1.0
    share_a, share_b = float(a.var(ddof=1)) / a.size, float(b.var(ddof=1)) / b.size
    if share_a + share_b == 0:
        return float(a.size + b.size - 2)
    return (share_a + share_b) ** 2 / (share_a**2 / (a.size - 1) + share_b**2 / (b.size - 1))


def percentile_interval(
    estimate: float,
    draws: FloatArray,
    n: int,
    level: float = 0.95,
    *,
    df: float | None = None,
) -> Interval:
    """Bounds from resamples of n units: expanded percentiles, or Student's below `FEWEST`; `df` defaults to n − 1."""
    if not 0 < level < 1:
        raise UserError(f"level {level}", "a confidence level lies between 0 and 1", "use 0.95")
    draws = draws[np.isfinite(draws)]
    low = high = math.nan
    if n > 1 and draws.size:
        quantile = math.sqrt(n / (n - 1)) * student_quantile((1 - level) / 2, n - 1 if df is None else df)
        if n < FEWEST:
            reach = quantile * float(draws.std())
            low, high = estimate + reach, estimate - reach
        else:
            tail = normal_cdf(quantile)
            low, high = (float(bound) for bound in np.quantile(draws, [tail, 1 - tail]))
    method = "bootstrap" if n >= FEWEST else "student"
    return Interval(estimate=estimate, low=low, high=high, n=n, level=level, method=method)
