"""How often decisions are right where both kinds count the same, whatever their shares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def balanced_accuracy(reads: NDArray[np.bool_], labels: NDArray[np.bool_]) -> float:
    """Mean over concepts of the mean of both classes' shares of right readings; NaN where no concept has both.

    Args:
        reads: `[N, C]` what is said of each concept.
        labels: `[N, C]` what is so.
    """
    right, on = reads == labels, labels.sum(axis=0)
    off = len(labels) - on
    both = (on > 0) & (off > 0)
    if not both.any():
        return float("nan")
    shares = (right & labels).sum(axis=0)[both] / on[both] + (right & ~labels).sum(axis=0)[both] / off[both]
    return float(shares.mean() / 2)
