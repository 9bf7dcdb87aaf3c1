"""What a run keeps of a search while it goes on, so that the same command continues: scores and choices as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from trimtab.finding.choosing import Choice
from trimtab.finding.exact import Agreement, ScoredFeature
from trimtab.finding.ground import Ground
from trimtab.finding.prompting import InstructionChoice
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.lm import Site
from trimtab.steering import DirectionTable


@dataclass(frozen=True, kw_only=True)
class KeptPart:
    """A direction of an edit."""

    site: str
    row: int
    dose: float


@dataclass(frozen=True, kw_only=True)
class KeptEdit:
    """An edit by features."""

    parts: tuple[KeptPart, ...]
    operation: Literal["add", "ablate"]

    @classmethod
    def of(cls, edit: SteeringEdit) -> KeptEdit:
        """The edit as plain values."""
        parts = tuple(KeptPart(site=str(p.site), row=p.row, dose=p.dose) for p in edit.parts)
        return cls(parts=parts, operation=edit.operation)

    @property
    def edit(self) -> SteeringEdit:
        """The edit again."""
        return SteeringEdit(tuple(Part(Site.parse(p.site), p.row, p.dose) for p in self.parts), self.operation)


@dataclass(frozen=True, kw_only=True)
class KeptScores:
    """What gradient and exact stage gave."""

    singles: tuple[KeptEdit, ...]
    features: tuple[ScoredFeature, ...]
    agreement: tuple[Agreement, ...]


@dataclass(frozen=True, kw_only=True)
class KeptChoice:
    """What one way chose."""

    name: str
    edit: KeptEdit | None
    """None for an instruction."""
    instruction: str
    vectors: dict[str, tuple[float, ...]]
    """By site, where it steers with a vector."""
    effects: tuple[float, ...]
    kl: float
    tried: int

    @classmethod
    def of(cls, name: str, choice: Choice | InstructionChoice, ground: Ground) -> KeptChoice:
        """A choice as plain values."""
        vectors: dict[str, tuple[float, ...]] = {}
        if isinstance(choice, Choice) and choice.tables is not ground.tables:
            vectors = {str(site): tuple(choice.tables[site].rows[0].tolist()) for site in choice.edit.sites}
        return cls(
            name=name,
            edit=KeptEdit.of(choice.edit) if isinstance(choice, Choice) else None,
            instruction="" if isinstance(choice, Choice) else choice.instruction,
            vectors=vectors,
            effects=tuple(choice.effects.tolist()),
            kl=choice.kl,
            tried=choice.tried,
        )

    def choice(self, ground: Ground) -> Choice | InstructionChoice:
        """The choice again."""
        effects = torch.tensor(self.effects, dtype=torch.float64)
        if self.edit is None:
            return InstructionChoice(instruction=self.instruction, effects=effects, kl=self.kl, tried=self.tried)
        tables = ground.tables
        if self.vectors:
            tables = {
                Site.parse(site): DirectionTable(torch.tensor([row], device=ground.model.device))
                for site, row in self.vectors.items()
            }
        return Choice(edit=self.edit.edit, tables=tables, effects=effects, kl=self.kl, tried=self.tried)


@dataclass(frozen=True, kw_only=True)
class KeptChoices:
    """What every way chose, and which could not."""

    choices: tuple[KeptChoice, ...]
    missing: dict[str, str]
    seconds: dict[str, float]

    def by_name(self, ground: Ground) -> Mapping[str, Choice | InstructionChoice]:
        """The choices again."""
        return {one.name: one.choice(ground) for one in self.choices}
