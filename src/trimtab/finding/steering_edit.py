"""What is done at each decision: directions at sites with relative doses, or features removed. As sources run it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.lm import DecodeStart, InterventionSource, LanguageModel, Site, edited
from trimtab.lm.editing import RowColumns, SourceRunner
from trimtab.lm.sites import site_order
from trimtab.steering import DirectionTable, StaticSource

Tables = Mapping[Site, DirectionTable]
"""Directions by site, whose rows edits name: a dictionary's features, or vectors."""


class Part(NamedTuple):
    """One direction of an edit."""

    site: Site
    row: int
    """Of the site's table: the feature."""
    dose: float
    """In units of ‖x‖, with its sign; without a meaning where the feature is removed."""


@dataclass(frozen=True)
class SteeringEdit:
    """An edit of every position whose logits choose a token."""

    parts: tuple[Part, ...]
    operation: Literal["add", "ablate"] = "add"
    length: float = 1.0
    """Norm of the sum of its directions at their doses, over that of as many at right angles."""

    @classmethod
    def joint(cls, parts: Sequence[Part], tables: Tables) -> SteeringEdit:
        """Directions that are added together, as far as their sum is long."""
        sums: dict[Site, Tensor] = {}
        for part in parts:
            row = part.dose * tables[part.site].rows[part.row].detach().double().cpu()
            sums[part.site] = sums.get(part.site, 0) + row
        norm = math.hypot(*(float(each.norm()) for each in sums.values()))
        return cls(tuple(parts), length=norm / math.hypot(*(part.dose for part in parts)))

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(sorted({part.site for part in self.parts}, key=site_order))

    @property
    def dose(self) -> float:
        """Of all its parts together: the norm of their sum in units of ‖x‖."""
        return self.length * math.hypot(*(part.dose for part in self.parts))

    def scaled(self, factor: float) -> SteeringEdit:
        """The same with its doses multiplied."""
        return replace(self, parts=tuple(part._replace(dose=part.dose * factor) for part in self.parts))

    def at_dose(self, dose: float) -> SteeringEdit:
        """The same with its doses scaled so that all together are of another; a removal has none."""
        return self if self.operation == "ablate" else self.scaled(dose / self.dose)

    def source(self, tables: Tables) -> StaticSource:
        """What edits all rows alike."""
        return source_of(tables, [self])


def source_of(tables: Tables, edits: Sequence[SteeringEdit]) -> StaticSource:
    """One source for rows that each have an edit of their own, all of one operation."""
    sites = sorted({part.site for edit in edits for part in edit.parts}, key=site_order)
    features: dict[Site, Tensor] = {}
    doses: dict[Site, Tensor] = {}
    for site in sites:
        mine = [[part for part in edit.parts if part.site == site] for edit in edits]
        width = max(map(len, mine))
        features[site] = torch.tensor([[p.row for p in row] + [-1] * (width - len(row)) for row in mine])
        doses[site] = torch.tensor([[float(p.dose) for p in row] + [0.0] * (width - len(row)) for row in mine])
    chosen = {site: tables[site] for site in sites}
    return StaticSource(chosen, features, doses, unit="relative", operation=edits[0].operation)


def together(edits: Sequence[SteeringEdit]) -> list[list[int]]:
    """Which edits can go through the model side by side: those with the same sites and operation."""
    groups: dict[tuple[str, tuple[Site, ...]], list[int]] = {}
    for i, edit in enumerate(edits):
        groups.setdefault((edit.operation, edit.sites), []).append(i)
    return list(groups.values())


@contextmanager
def steering(
    model: LanguageModel, source: InterventionSource, prompts: Sequence[Sequence[int]], fed: Int[Tensor, "R A"]
) -> Iterator[None]:
    """One forward pass under a source, of prompts' last tokens and answers behind them.

    Args:
        model: the model.
        source: decides edits; row r of its features is row r here.
        prompts: of each row.
        fed: the tokens that are fed: the last of the prompt, and those of the answer.
    """
    rows, device = len(prompts), model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    number, zeros = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.long, device=device)
    n_inputs = [len(prompt) + fed.shape[1] - 1 for prompt in prompts]
    source.start(DecodeStart([list(p) for p in prompts], number, fed.shape[1], device, n_inputs, model))
    source.keep_log = False  # type: ignore[attr-defined]
    runner = SourceRunner(model, source)
    position = lengths[:, None] - 1 + torch.arange(fed.shape[1], device=device)
    which = number[:, None].expand_as(fed)
    runner.aim(fed, position, RowColumns(number, number, lengths, zeros, zeros, zeros), which)
    with edited(model, runner.edits()):
        yield
