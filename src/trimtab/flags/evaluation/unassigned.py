"""Dimensions that are no flag's, as a control: the same reading, and the same changes, where nothing was trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trimtab.errors import UserError
from trimtab.flags.spec import FlagSpec


def unassigned_dims(flags: FlagSpec, seed: int = 0) -> FlagSpec:
    """As many random dimensions in place of each concept's own, at the same sites with the same targets.

    Raises:
        UserError: the model has too few dimensions that are no flag's.
    """
    free = np.setdiff1d(np.arange(flags.d_model), flags.flat_dims)
    needed = len(flags.flat_dims)
    if len(free) < needed:
        why = f"{len(free)} of {flags.d_model} dimensions are no flag's, and the control needs {needed}"
        raise UserError("dimensions of the control", why, "evaluate flags of fewer dimensions")
    drawn = iter(np.random.default_rng(seed).choice(free, needed, replace=False).tolist())
    return replace(flags, dims=tuple(tuple(next(drawn) for _ in dims) for dims in flags.dims))
