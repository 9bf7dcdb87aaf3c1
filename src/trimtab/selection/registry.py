"""Criteria by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from trimtab.errors import UserError
from trimtab.selection.criterion import Criterion
from trimtab.selection.delta_confidence import DeltaConfidence
from trimtab.selection.firing_rate import FiringRate
from trimtab.selection.kl import KLDivergence
from trimtab.selection.max_activation import MaxActivation
from trimtab.selection.output_score import OutputScore
from trimtab.selection.random import Random

_CLASSES = (DeltaConfidence, OutputScore, KLDivergence, MaxActivation, FiringRate, Random)
CRITERIA: dict[str, type[Any]] = {criterion.name: criterion for criterion in _CLASSES}
"""Every criterion class by its name."""


def make_criteria(names: Sequence[str], settings: dict[str, Any] | None = None) -> list[Criterion]:
    """Criteria by name, sharing settings.

    Args:
        names: keys of `CRITERIA`, each once.
        settings: fields by name (`k`, `alpha`, `prefixes`, `seed`, …). Each criterion takes those that it has; None
            leaves its default.

    Raises:
        UserError: an unknown name, one given twice, a setting that none of them has, or a bad value.
    """
    if not names:
        raise UserError("the criteria", "there is none", f"choose among {', '.join(CRITERIA)}")
    for i, name in enumerate(names):
        if name not in CRITERIA:
            raise UserError(f"criterion {name!r}", f"there are {', '.join(CRITERIA)}", "choose one of them")
        if name in names[:i]:
            raise UserError(f"criterion {name!r}", "it is given twice", "give it once")
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    taken = {name: {f.name for f in dataclasses.fields(CRITERIA[name])} for name in names}
    for setting in given:
        if not any(setting in fields for fields in taken.values()):
            raise UserError(
                f"setting {setting}",
                f"none of the criteria {', '.join(names)} has it",
                "leave it out or add a criterion that does",
            )
    return [CRITERIA[name](**{k: v for k, v in given.items() if k in taken[name]}) for name in names]
