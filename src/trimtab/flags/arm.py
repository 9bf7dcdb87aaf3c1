"""Flags as an arm of comparisons: beside features, vectors, policies and prompts on any task.

`trimtab policy evaluate RUN --control trimtab.flags.arm:SwitchedFlags` puts it beside a policy of a model with flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trimtab.control import Answers, Arm, ArmKind, Choosing, ItemSet
from trimtab.control.arm import Match
from trimtab.errors import UserError
from trimtab.flags.files import NAME, found_directory, load_flags
from trimtab.flags.spec import FlagSpec
from trimtab.flags.switches import SwitchedRows
from trimtab.lm import LanguageModel


@dataclass(frozen=True, kw_only=True)
class SwitchedFlags(ArmKind):
    """A model's flags under switches: those given, or one concept on or off, whichever is best on validation. At equal
    KL the strength is scaled."""

    name: ClassVar[str] = "flags"
    main: ClassVar[bool] = True
    strengths: ClassVar[tuple[Match, ...]] = ("own", "kl")
    model: LanguageModel | None = None
    """The model with flags; the setting's by default. Divergence is from the setting's, unsteered."""
    flags: FlagSpec | None = None
    """Its flags; by default those beside the files that it was loaded from."""
    switches: Mapping[str, float] | None = None
    """Strength of each concept that is set; chosen by default."""
    tried: tuple[float, ...] = (1.0, 0.0)
    """Strengths of each concept that are tried."""

    def effort(self, choosing: Choosing) -> dict[str, int]:
        if self.switches is not None:
            return {}
        try:
            concepts = len(self.flags_of(self.model or choosing.validation.setting.model).concepts)
        except UserError:  # the comparison will say so
            return {}
        return {"switches": concepts * len(self.tried) * len(choosing.validation)}

    def arms(self, choosing: Choosing) -> list[Arm]:
        flags = self.flags_of(self.model or choosing.validation.setting.model)
        about = (
            {"switches": dict(self.switches)} if self.switches is not None else self._choice(flags, choosing.validation)
        )
        switches: Mapping[str, float] = about["switches"]

        def answer(items: ItemSet, scale: float) -> list[Answers]:
            return [self.answer(items, flags, {name: scale * value for name, value in switches.items()})]

        matches: tuple[Match, ...] = ("own", "kl") if any(switches.values()) else ("own",)
        return [self.arm(answer, about, match=match) for match in matches]

    def answer(self, items: ItemSet, flags: FlagSpec, switches: Mapping[str, float]) -> Answers:
        """Answers to items under switches."""
        return items.answer(SwitchedRows(flags, [switches]), model=self.model, kl=True)

    def flags_of(self, model: LanguageModel) -> FlagSpec:
        """The flags that are switched: those given, or those beside the model's files."""
        # An adapter's own name is the model's; its weights know that of the base alone.
        names = [name for name in (model.name, model.hf.name_or_path) if name]
        beside = [name for name in names if (found_directory(name) / NAME).is_file()]
        return self.flags or load_flags((beside or names)[0], model)

    def _choice(self, flags: FlagSpec, validation: ItemSet) -> dict[str, Any]:
        """Switches with their mean reward on validation, which is the largest of several, and so too good."""
        tried = [{concept: strength} for strength in self.tried for concept in flags.concepts]
        rewards = [float(self.answer(validation, flags, switches).reward.mean()) for switches in tried]
        best = max(range(len(tried)), key=lambda i: (rewards[i], -i))
        return {"switches": tried[best], "reward": rewards[best], "tried": len(tried)}
