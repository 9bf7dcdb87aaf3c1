"""Intervals for proportions."""

from __future__ import annotations

import math

from trimtab.errors import UserError
from trimtab.stats.distributions import normal_quantile
from trimtab.stats.interval import Interval


def wilson_interval(successes: float, n: int, *, level: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927), which behaves at 0 and 1 where the bootstrap cannot.

    Args:
        successes: number of successes among `n` independent trials. Where each is known by its probability, their sum:
            it varies less than a count does, so that the interval is too wide rather than too narrow.
        n: number of trials.
        level: confidence level.

    Raises:
        UserError: no trials, or successes outside 0 to n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise UserError(f"{successes} successes in {n} trials", "there must be 0 to n successes in n ≥ 1 trials")
    z = normal_quantile((1 + level) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(estimate=share, low=low, high=high, n=n, level=level, method="wilson")
