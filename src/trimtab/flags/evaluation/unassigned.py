"""Dimensions that are no flag's, as a control: the same reading, and the same changes, where nothing was trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from trimtab.control.arms.random_features import draw_seed
from trimtab.errors import UserError
from trimtab.flags.spec import FlagSpec

POOL = 4
"""Times as many dimensions as flags have are drawn from."""
DRAWS = 3
"""Of a control's dimensions, and of shuffled labels."""
VARIANCE_ITEMS = 32
"""Examples over which the variance of the original's dimensions is taken."""


def unassigned_draws(flags: FlagSpec, variance: Float[np.ndarray, " d"], seed: int = 0) -> list[FlagSpec]:
    """As many dimensions in place of each concept's own, at the same sites with the same targets; several draws.

    Args:
        flags: whose dimensions are not drawn.
        variance: of every dimension before the finetuning, as `place_flags` takes it.
        seed: of the draws from `matched_dims`.

    Raises:
        UserError: the model has too few dimensions that are no flag's.
    """
    among, found = matched_dims(flags, variance), list[FlagSpec]()
    for draw in range(DRAWS):
        random = np.random.default_rng(draw_seed(seed, draw))
        drawn = iter(random.choice(among, len(flags.flat_dims), replace=False).tolist())
        found.append(replace(flags, dims=tuple(tuple(next(drawn) for _ in dims) for dims in flags.dims)))
    return found


def matched_dims(flags: FlagSpec, variance: Float[np.ndarray, " d"]) -> list[int]:
    """The four times as many dimensions as flags have that are no flag's and whose variance is nearest to theirs (the
    mean of its logarithm): the next-lowest where flags have the lowest.

    Raises:
        UserError: there are too few.
    """
    free = np.setdiff1d(np.arange(flags.d_model), flags.flat_dims)
    needed = len(flags.flat_dims)
    if len(free) < needed:
        why = f"{len(free)} of {flags.d_model} dimensions are no flag's, and the control needs {needed}"
        raise UserError("dimensions of the control", why, "evaluate flags of fewer dimensions")
    logs = np.log(np.maximum(variance, 1e-30))
    nearest = np.argsort(np.abs(logs[free] - logs[flags.flat_dims].mean()), kind="stable")
    return free[nearest][: POOL * needed].tolist()
