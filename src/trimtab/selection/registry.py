"""Criteria by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from trimtab.errors import UserError
from trimtab.runs import registered_class
from trimtab.selection.criterion import (
    Criterion,
    EffectCriterion,
    GradientCriterion,
    StatisticCriterion,
)
from trimtab.selection.delta_confidence import DeltaConfidence
from trimtab.selection.entropy_change import EntropyChange
from trimtab.selection.explanation_score import ExplanationScore
from trimtab.selection.firing_rate import FiringRate
from trimtab.selection.gradient_attribution import GradientAttribution
from trimtab.selection.input_score import InputScore
from trimtab.selection.kl import KLDivergence
from trimtab.selection.lens_concentration import LensConcentration
from trimtab.selection.max_activation import MaxActivation
from trimtab.selection.output_score import OutputScore
from trimtab.selection.random_scores import Random

_CLASSES = (
    DeltaConfidence, OutputScore, KLDivergence, EntropyChange, GradientAttribution,
    InputScore, LensConcentration, ExplanationScore, MaxActivation, FiringRate, Random,
)  # fmt: skip
CRITERIA: dict[str, type[Any]] = {criterion.name: criterion for criterion in _CLASSES}
"""Every criterion class by its name."""


def make_criteria(names: Sequence[str], settings: dict[str, Any] | None = None) -> list[Criterion]:
    """Criteria by name, sharing settings.

    Args:
        names: keys of `CRITERIA`, or `module:Class` for one's own, each once.
        settings: fields by name (`k`, `alpha`, `prefixes`, `seed`, …). Each criterion takes those that it has; None
            leaves its default.

    Raises:
        UserError: an unknown name, one given twice, a setting that none of them has, or a bad value.
    """
    if not names:
        raise UserError("the criteria", "there is none", f"choose among {', '.join(CRITERIA)}")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"criterion {twice!r}", "it is given twice", "give it once")
    bases = EffectCriterion, GradientCriterion, StatisticCriterion
    classes = [registered_class(name, "criterion", CRITERIA, *bases) for name in names]
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    taken = [{field.name for field in dataclasses.fields(criterion)} for criterion in classes]
    for setting in given:
        if not any(setting in fields for fields in taken):
            raise UserError(
                f"setting {setting}",
                f"none of the criteria {', '.join(names)} has it",
                "leave it out or add a criterion that does",
            )
    return [
        criterion(**{name: value for name, value in given.items() if name in fields})
        for criterion, fields in zip(classes, taken, strict=True)
    ]


def criterion_object(given: Any) -> Criterion:
    """A criterion as it is, a class of one with its default settings; a `UserError` for anything else."""
    found = given() if isinstance(given, type) else given
    if not isinstance(found, EffectCriterion | GradientCriterion | StatisticCriterion):
        hint = f"give one of {', '.join(CRITERIA)}"
        raise UserError(f"criterion {given!r}", "it is neither a name nor a criterion", hint)
    return found
