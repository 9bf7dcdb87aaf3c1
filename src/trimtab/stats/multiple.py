"""Many tests at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from trimtab.errors import UserError
from trimtab.stats.samples import FloatArray


def benjamini_hochberg(p_values: ArrayLike) -> FloatArray:
    """Adjusted p-values `[m]`: rejecting those ≤ q keeps the false discovery rate of independent tests at q.

    Args:
        p_values: `[m]`, each between 0 and 1.

    Raises:
        UserError: a value outside 0 to 1, or not one axis.

    Source: Benjamini and Hochberg 1995; the adjusted form is Yekutieli and Benjamini 1999.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise UserError("p-values", "they must be a list of numbers between 0 and 1")
    order = np.argsort(p)
    scaled = p[order] * p.size / np.arange(1, p.size + 1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return adjusted
