"""The best that some of many tries would have reached."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from trimtab.stats.samples import FloatArray


def best_of_some(values: ArrayLike, counts: ArrayLike) -> FloatArray:
    """The largest of m of a row's r values, on average over all ways of choosing m of them; 0 for m = 0.

    Of C(r, m) ways, the k-th smallest value is the largest in C(k−1, m−1): pass@k's estimator (arXiv 2107.03374), for
    any values. It has less noise than some fixed m of them, and no bias.

    Args:
        values: `[P, r]`, of all that was tried.
        counts: `[P]`, m of each row, at most r.

    Returns:
        `[P]`.
    """
    best_first: FloatArray = -np.sort(-np.asarray(values, dtype=np.float64), axis=1)
    r: int = best_first.shape[1]
    k = np.arange(r, 1, -1, dtype=np.float64)
    found = np.zeros(len(best_first))
    for row, m in enumerate(np.asarray(counts, dtype=np.float64)):
        if m:
            share = np.full(r, m / r)
            share[1:] *= np.cumprod(np.maximum(k - m, 0) / (k - 1))
            found[row] = share @ best_first[row]
    return found
