"""Agreement between two orderings of the same items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from trimtab.errors import UserError
from trimtab.stats.bootstrap import percentile_interval
from trimtab.stats.interval import Interval
from trimtab.stats.samples import FloatArray, as_sample, per_prompt, same_length

_PAIRWISE_UP_TO = 1_500
"""Items up to which all pairs are held as matrices and resampled at once."""


def kendall_tau_b(
    x: ArrayLike, y: ArrayLike, *, level: float = 0.95, n_resamples: int = 1_000, seed: int = 0
) -> Interval:
    """Kendall's τ-b of two score vectors, with an interval that resamples items.

    An item drawn twice forms a pair tied in both orderings, which τ-b leaves out of numerator and denominator.

    Args:
        x, y: `[n]` scores of the same items.
        level, n_resamples, seed: as in `bootstrap_mean`.

    Raises:
        UserError: unequal lengths, non-finite values, or scores that are all equal.

    Source: Kendall, "The treatment of ties in ranking problems", 1945.
    """
    scores_x, scores_y = per_prompt(as_sample(x, "x")), per_prompt(as_sample(y, "y"))
    same_length(scores_x, scores_y)
    for name, scores in (("x", scores_x), ("y", scores_y)):
        if np.ptp(scores) == 0:
            raise UserError(name, f"its {scores.size} scores are all equal, so they rank nothing")
    n = scores_x.size
    rng = np.random.default_rng(seed)
    if n <= _PAIRWISE_UP_TO:
        counts = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.float32)
        taus = _tau_by_counts(scores_x, scores_y, np.concatenate([np.ones((1, n), np.float32), counts]))
        estimate, draws = float(taus[0]), taus[1:]
    else:
        estimate = _tau(scores_x, scores_y)
        draws = np.empty(n_resamples)
        for i in range(n_resamples):
            picks = rng.integers(n, size=n)
            draws[i] = _tau(scores_x[picks], scores_y[picks])
    return percentile_interval(estimate, draws, n, level)


def _tau(x: FloatArray, y: FloatArray) -> float:
    from scipy import stats  # pyright: ignore[reportMissingTypeStubs]  (here: it takes half a second)

    kendalltau = cast(Callable[..., Any], stats.kendalltau)  # pyright: ignore[reportUnknownMemberType]
    return float(kendalltau(x, y).statistic)


def _tau_by_counts(x: FloatArray, y: FloatArray, counts: np.ndarray[Any, np.dtype[np.float32]]) -> FloatArray:
    """τ-b of every weighting `counts [b, n]` of the items; entries are small integers, exact in float32."""
    order_x = np.sign(x[:, None] - x).astype(np.float32)
    order_y = np.sign(y[:, None] - y).astype(np.float32)

    def over_pairs(pairs: np.ndarray[Any, np.dtype[np.float32]]) -> FloatArray:
        return ((counts @ pairs).astype(np.float64) * counts).sum(axis=1)

    untied_x, untied_y = over_pairs(np.abs(order_x)), over_pairs(np.abs(order_y))
    with np.errstate(divide="ignore", invalid="ignore"):
        return over_pairs(order_x * order_y) / np.sqrt(untied_x * untied_y)
