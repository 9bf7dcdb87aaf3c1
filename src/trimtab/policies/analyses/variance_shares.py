"""How much of a feature's activation variance the groups of a factor explain: token, previous token, document."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import NDArray


def variance_share(activations: Float[np.ndarray, "R m"], groups: Shaped[NDArray, " R"]) -> Float[np.ndarray, " m"]:
    """ε² of a one-way analysis of variance: 1 if the group decides the activation, 0 on average if it says nothing.

    ε² = (SS_between − (k − 1)·MS_within) / SS_total, which is R² adjusted for the number of groups k: with thousands of
    tokens R² itself would be large for noise. By chance it can fall below 0.

    Args:
        activations: of m features at R rows.
        groups: label of each row.

    Returns:
        NaN for features that never vary, and for all where every row is a group of its own.

    Source: Kelley, "An unbiased correlation ratio measure", 1935.
    """
    f = activations.astype(np.float64)
    _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    rows, k = len(f), len(size)
    if rows <= k:
        return np.full(f.shape[1], np.nan)
    f = f - f.mean(0)
    sums = np.zeros((k, f.shape[1]))
    np.add.at(sums, group, f)
    total = (f**2).sum(0)
    # Directly, not as a difference of sums of squares, so that 1 is reached where the group decides all.
    within = ((f - (sums / size[:, None])[group]) ** 2).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = 1 - within / (rows - k) * (rows - 1) / total
    return np.where(total > 0, share, np.nan)
