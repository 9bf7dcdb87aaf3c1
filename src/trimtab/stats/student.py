"""Student's intervals, for means of few independent values or repetitions, where there is too little to resample."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from trimtab.stats.distributions import student_quantile
from trimtab.stats.interval import Interval
from trimtab.stats.samples import as_sample, per_prompt


def student_mean(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Mean ± t · s/√n (Student 1908), for values that are roughly normal, such as one score per training run.

    A bootstrap of five values cannot leave their range, which holds their mean far less often than it says.

    Args:
        values: `[n]`, or `[S, n]`, whose columns are averaged first.
        level: confidence level.

    Returns:
        The interval; a single value has no bounds (NaN).

    Raises:
        UserError: empty or non-finite values.
    """
    sample = per_prompt(as_sample(values))
    n, mean = sample.size, float(sample.mean())
    half = math.nan
    if n > 1:
        half = student_quantile((1 + level) / 2, n - 1) * float(sample.std(ddof=1)) / math.sqrt(n)
    return Interval(estimate=mean, low=mean - half, high=mean + half, n=n, level=level, method="student")


def crossed_mean(values: ArrayLike) -> Interval:
    """Mean over repetitions and prompts, with an interval that speaks of other repetitions and other prompts.

    The variance is that of the pigeonhole bootstrap (Owen, "The pigeonhole bootstrap", 2007), in closed form: the
    variance of the repetitions' means over S plus that of the prompts' means over P, which counts their interaction
    twice and is so slightly too wide. Degrees of freedom are Satterthwaite's. Percentiles of a bootstrap would not
    do: for three repetitions the ones to take, expanded for so few, lie beyond the outermost of 10,000 resamples.

    Args:
        values: `[S, P]`, one row per repetition.

    Raises:
        UserError: empty or non-finite values. A single repetition or prompt gives bounds of NaN.
    """
    sample = np.atleast_2d(as_sample(values))
    estimate, reach = float(sample.mean()), math.nan
    if min(sample.shape) > 1:
        parts = [(float(sample.mean(1 - axis).var(ddof=1)) / n, n) for axis, n in enumerate(sample.shape)]
        variance = sum(part for part, _ in parts)
        df = variance**2 / sum(part**2 / (n - 1) for part, n in parts) if variance else 1.0
        reach = student_quantile(0.975, df) * math.sqrt(variance)
    low, high = estimate - reach, estimate + reach
    return Interval(estimate=estimate, low=low, high=high, n=sample.shape[1], method="crossed")
