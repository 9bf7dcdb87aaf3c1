"""What a wish makes of a result's arms: measured by whoever knows wishes, on sources that steer all texts alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trimtab.errors import UserError
from trimtab.lm import InterventionSource
from trimtab.stats import Interval
from trimtab.steering.random_arms import EqualDoseSource
from trimtab.steering.sources import StaticSource

DRAWS = 4
"""Random features whose effects are averaged for a control."""


@dataclass(frozen=True, kw_only=True)
class WishScore:
    """Effects on a wish."""

    unit: str
    effects: tuple[Interval, ...]
    """Of each arm, over the wish's examples."""


Score = Callable[[Sequence[Sequence[StaticSource]]], WishScore]
"""From sources of each arm, whose effects are averaged, to what the wish makes of them."""


def of_row(source: InterventionSource, row: int) -> StaticSource:
    """What a source does to one of its rows, for all rows alike.

    Raises:
        UserError: it decides anew at each token, or is several sources at once.
    """
    if not isinstance(source, StaticSource):
        raise UserError("the score", "only one steering of constant doses is scored", "leave --score out")
    own = {site: [each[min(row, len(each) - 1)][None] for each in choice] for site, choice in source.choices.items()}
    return StaticSource(
        source.tables, {site: feature for site, (feature, _) in own.items()},
        {site: dose for site, (_, dose) in own.items()}, unit=source.unit, operation=source.operation,
        positions=source.where, combine=source.combine,
    )  # fmt: skip


def of_control(control: EqualDoseSource, rows: Sequence[int]) -> list[StaticSource]:
    """Some of the random features of an arm's control, each at its mean relative dose.

    Args:
        control: of all arms.
        rows: of the arm, in the control.
    """
    dose = {site: float(each[list(rows)].nanmean()) for site, each in control.relative.items()}
    drawn = torch.stack([control.drawn[site][list(rows)] for site in control.sites], dim=1)
    several = drawn.unique(dim=0)[:DRAWS].tolist()
    return [
        StaticSource(control.tables, dict(zip(control.sites, ids, strict=True)), dose, positions=control.where)
        for ids in several
    ]
