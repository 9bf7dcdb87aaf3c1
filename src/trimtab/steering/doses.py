"""How strongly a feature is added: three units of dose, and what each means for one activation.

With v̂ the feature's unit decoder row, m its largest activation over the statistics' corpus (times ‖W_dec‖, so that it
is a length in activation space) and x the activation before the edit, a dose of

- `absolute` c adds c·v̂,
- `max_activation` α adds α·m·v̂,
- `relative` r adds r·‖x‖·v̂.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError, check_one_of

Unit = Literal["absolute", "max_activation", "relative"]
UNITS: tuple[str, ...] = get_args(Unit)
DEFAULT_DOSE = 0.4
DEFAULT_UNIT: Unit = "relative"


def coefficients(
    unit: str,
    dose: Float[Tensor, "R K"],
    x: Float[Tensor, "R d"],
    max_activation: Float[Tensor, "R K"] | None = None,
) -> Float[Tensor, "R K"]:
    """Coefficients along unit directions that give a dose.

    Args:
        unit: `absolute`, `max_activation` or `relative`.
        dose: in that unit, one per row and slot; any sign.
        x: the activations before the edit; used by `relative`.
        max_activation: m of each slot's feature, in model units; used by `max_activation`.

    Returns:
        Lengths in model units, in float32 or x's precision if that is higher.

    Raises:
        UserError: the unit is unknown, or needs statistics that are not there.
    """
    check_unit(unit, has_statistics=max_activation is not None)
    dtype = torch.promote_types(x.dtype, torch.float32)
    dose = dose.to(x.device, dtype)
    if unit == "absolute":
        return dose
    if unit == "max_activation":
        assert max_activation is not None
        return dose * max_activation.to(x.device, dtype)
    return dose * x.to(dtype).norm(dim=-1, keepdim=True)


def check_unit(unit: str, *, has_statistics: bool) -> None:
    """Raise a `UserError` if a unit is unknown or needs statistics that are not there."""
    check_one_of("unit", unit, UNITS)
    if unit == "max_activation" and not has_statistics:
        raise UserError(
            "unit max_activation",
            "the dictionary comes without feature statistics, so largest activations are unknown",
            "compute its statistics, or use unit relative or absolute",
        )


def check_doses(doses: float | Iterable[float] | Tensor) -> None:
    """Raise a `UserError` if a dose is not a finite number."""
    if isinstance(doses, Tensor):
        doses = doses.flatten().tolist()
    for value in doses if isinstance(doses, Iterable) and not isinstance(doses, str) else [doses]:
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"dose {value!r}", "a dose is a finite number", "give one like 0.4")
