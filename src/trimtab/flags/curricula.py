"""When a finetuning forces its flags, and how much their loss weighs, over its progress from 0 to 1.

A forced step writes the right values into the flags everywhere; its loss is the cross-entropy alone. Other steps add
the flags' loss. What a curriculum asks is whether reliance on flags emerges by itself: `forced` trains the model to use
them, `auxiliary` only to fill them, `plain` does neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trimtab.errors import UserError, named
from trimtab.lm.sampling import uniform
from trimtab.runs import read_json, read_typed

FORCING_STREAM = 31
"""Of the draws that decide which steps are forced."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Part of a finetuning.

    Raises:
        UserError: a value is out of range.
    """

    until: float
    """Share of all steps at which it ends."""
    forced: float
    """Share of its steps that are forced."""
    weight: float
    """λ: what the flags' loss is multiplied by in the others."""

    def __post_init__(self) -> None:
        for name, value in (("until", self.until), ("forced", self.forced)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} {value} of a phase", "it is a share, from 0 to 1", "give another")
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"weight {self.weight} of a phase", "it must be at least 0", "give another")


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Phases, one behind the other, the last one up to 1.

    Raises:
        UserError: they are not in order, or do not end at 1.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        ends = [phase.until for phase in self.phases]
        if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
            raise UserError(f"phases that end at {ends}", "each ends later, the last at 1", "give them in order")

    def at(self, progress: float) -> Phase:
        """The phase at a share of the steps, from 0 to below 1."""
        return next(phase for phase in self.phases if progress < phase.until or phase is self.phases[-1])

    def forces(self, step: int, steps: int, seed: int) -> bool:
        """Whether a step is forced; the draw depends on seed and step alone."""
        draw = uniform(seed, torch.tensor([step]), 0, 0, FORCING_STREAM)
        return float(draw) < self.at(step / steps).forced

    @classmethod
    def named(cls, given: str | Curriculum) -> Curriculum:
        """A curriculum by its name, from a JSON file, or as it is.

        Args:
            given: one of `CURRICULA`, or the path of a `.json` file that holds a list of phases, each with `until`,
                `forced` and `weight`.

        Raises:
            UserError: there is none of that name, or the file holds no curriculum.
        """
        if isinstance(given, Curriculum):
            return given
        if not given.endswith(".json"):
            return named(CURRICULA, given, "curriculum")
        phases = read_json(given)
        if phases is None:
            raise UserError(f"curriculum {given}", "there is no such file", "check the path")
        return cls(phases=read_typed(tuple[Phase, ...], phases, f"curriculum {given}"))


_PAPER = ((0.1, 1.0, 0.0), (0.2, 0.9, 2.0), (0.3, 0.8, 5.0), (0.4, 0.7, 10.0), (0.6, 0.5, 20.0), (1.0, 0.5, 30.0))
"""End, forced share and λ: the published schedule of 50,000 steps, as shares."""

CURRICULA: Mapping[str, Curriculum] = {
    "plain": Curriculum(phases=(Phase(until=1, forced=0, weight=0),)),
    "auxiliary": Curriculum(phases=tuple(Phase(until=end, forced=0, weight=w) for end, _, w in _PAPER)),
    "forced": Curriculum(phases=tuple(Phase(until=end, forced=share, weight=w) for end, share, w in _PAPER)),
}
"""`plain` finetunes on the text alone, `auxiliary` adds the flags' loss, `forced` is the paper's."""
