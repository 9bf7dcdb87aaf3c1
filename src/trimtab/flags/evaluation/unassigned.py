"""Dimensions that are no flag's, as a control: the same reading, and the same changes, where nothing was trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.flags.spec import FlagSpec

POOL = 4
"""Times as many dimensions as flags have are drawn from, where variance is known."""


def unassigned_dims(
    flags: FlagSpec, seed: int = 0, variance: Float[NDArray[np.float64], " d"] | None = None
) -> FlagSpec:
    """As many random dimensions in place of each concept's own, at the same sites with the same targets.

    Args:
        flags: whose dimensions are not drawn.
        seed: of the draw.
        variance: of every dimension before the finetuning, as `place_flags` takes it. Dimensions are drawn from all of
            `matched_dims` then, otherwise from all that are no flag's.

    Raises:
        UserError: the model has too few dimensions that are no flag's.
    """
    among = matched_dims(flags, variance)
    drawn = iter(np.random.default_rng(seed).choice(among, len(flags.flat_dims), replace=False).tolist())
    return replace(flags, dims=tuple(tuple(next(drawn) for _ in dims) for dims in flags.dims))


def matched_dims(flags: FlagSpec, variance: Float[NDArray[np.float64], " d"] | None = None) -> list[int]:
    """Dimensions that are no flag's: all, or the four times as many as flags have whose variance is nearest to theirs
    (the mean of its logarithm), which are the next-lowest where flags have the lowest.

    Raises:
        UserError: there are too few.
    """
    free = np.setdiff1d(np.arange(flags.d_model), flags.flat_dims)
    needed = len(flags.flat_dims)
    if len(free) < needed:
        why = f"{len(free)} of {flags.d_model} dimensions are no flag's, and the control needs {needed}"
        raise UserError("dimensions of the control", why, "evaluate flags of fewer dimensions")
    if variance is not None:
        logs = np.log(np.maximum(variance, 1e-30))
        free = free[np.argsort(np.abs(logs[free] - logs[flags.flat_dims].mean()), kind="stable")][: POOL * needed]
    return free.tolist()
