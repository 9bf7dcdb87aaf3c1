"""Checked samples: prompts along the last axis, seeds (if any) along the first."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimtab.errors import UserError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def as_sample(values: ArrayLike, name: str = "values") -> FloatArray:
    """`values` as float64 `[P]` or `[S, P]`.

    Raises:
        UserError: no values, more than two axes, or a value that is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim not in (1, 2):
        raise UserError(f"{name} of shape {sample.shape}", "a sample is [prompts] or [seeds, prompts]")
    if sample.size == 0:
        raise UserError(f"{name}", "there are no values", "score at least one prompt")
    if not np.isfinite(sample).all():
        bad = int((~np.isfinite(sample)).sum())
        raise UserError(f"{name}", f"{bad} of {sample.size} values are not finite", "leave them out and say so")
    return sample


def per_prompt(sample: FloatArray) -> FloatArray:
    """Means over seeds `[P]` of a sample `[P]` or `[S, P]`."""
    return sample if sample.ndim == 1 else sample.mean(axis=0)


def same_length(a: FloatArray, b: FloatArray) -> None:
    """Raise a `UserError` unless `a` and `b` hold the same number of prompts."""
    if a.shape[-1] != b.shape[-1]:
        raise UserError(
            f"paired samples of {a.shape[-1]} and {b.shape[-1]}", "each value needs its partner", "use paired=False"
        )
