"""Intervals for means of few independent values, where there is too little to resample."""

from __future__ import annotations

import math

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
