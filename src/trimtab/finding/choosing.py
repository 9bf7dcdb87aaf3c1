"""The one choice that every way of steering goes through: candidates by their exact effects, on examples for choosing.

All candidates are tried at the middle dose, the best few at every dose; of what the budget allows the strongest is
taken, ties going to the smaller dose. Where the smallest dose is too dear already, it is lowered until it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.control.dose_search import match_kls
from trimtab.errors import UserError
from trimtab.finding.ground import Ground
from trimtab.finding.steering_edit import SteeringEdit, Tables
from trimtab.steering import StaticSource

LEFT = 2
"""Candidates that are tried at every dose."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What a way of steering chose."""

    edit: SteeringEdit
    tables: Tables
    effects: Float[Tensor, " X"]
    """On the examples it was chosen on; too good, as the best of several."""
    kl: float
    """On neutral text for choosing, in nats per token."""
    tried: int
    """Candidates."""

    @property
    def source(self) -> StaticSource:
        """What steers with it."""
        return self.edit.source(self.tables)


def choose(ground: Ground, candidates: Sequence[SteeringEdit], tables: Tables | None = None) -> Choice:
    """Choose an edit and its dose.

    Args:
        ground: what is searched.
        candidates: edits of any dose.
        tables: of their directions, if they are not the features'.

    Raises:
        UserError: there is no candidate, or none within the budget whose dose could be lowered.
    """
    if not candidates:
        raise UserError("the candidates", "there is none", "give other examples, or another SAE")
    doses = ground.options.dose
    middle = [_at(one, doses[(len(doses) - 1) // 2]) for one in candidates]
    means = ground.effects("choice", middle, tables).mean(1)
    left = [candidates[i] for i in means.argsort(descending=True, stable=True)[:LEFT].tolist()]
    trials = list(dict.fromkeys(_at(one, dose) for one in left for dose in doses))
    trials.sort(key=lambda edit: edit.dose)
    effects, kl = ground.effects("choice", trials, tables), ground.kl("choice", trials, tables).mean(1)
    within = kl <= ground.options.most_kl
    if bool(within.any()):
        best = int(torch.where(within, effects.mean(1), -torch.inf).argmax())
        edit = trials[best]
    else:
        lowered = _lowered(ground, left, tables)
        effects = ground.effects("choice", lowered, tables)
        kl = ground.kl("choice", lowered, tables).mean(1)
        best = int(effects.mean(1).argmax())
        edit = lowered[best]
    return Choice(
        edit=edit, tables=tables or ground.tables, effects=effects[best], kl=float(kl[best]), tried=len(candidates)
    )  # fmt: skip


def _lowered(ground: Ground, left: Sequence[SteeringEdit], tables: Tables | None) -> list[SteeringEdit]:
    """The best candidates with their doses lowered into the budget."""
    options = ground.options
    dosed = [_at(one, options.dose[0]) for one in left if one.operation == "add"]
    if not dosed:
        raise UserError(f"budget {options.budget}", "removing these features costs more", "raise it")

    def kl(scales: list[float]) -> list[float]:
        edits = [edit.scaled(scale) for edit, scale in zip(dosed, scales, strict=True)]
        return ground.kl("choice", edits, tables).mean(1).tolist()

    found = match_kls(kl, [0.95 * options.most_kl] * len(dosed), tolerance=0.05)
    return [edit.scaled(match.scale) for edit, match in zip(dosed, found, strict=True)]


def _at(edit: SteeringEdit, dose: float) -> SteeringEdit:
    return edit if edit.operation == "ablate" else edit.at_dose(dose)
