"""Ways of control beside flags, as arms of `control`: what each chooses on validation, and what answers prompts.

The setting's model is the original one. Flags and finetunings are other models of the same tokenizer; their divergence
is from the original, too, at the tokens that they chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from trimtab.control import Answers, Arm, ArmKind, Choosing, ItemSet
from trimtab.control.arm import Match
from trimtab.control.arms.prompting import PromptChoice, Prompting, instructed
from trimtab.control.arms.random_features import draw_seed
from trimtab.control.arms.static import BestStatic
from trimtab.flags.arm import SwitchedFlags
from trimtab.flags.evaluation.unassigned import unassigned_dims
from trimtab.flags.spec import FlagSpec
from trimtab.flags.switched_rows import DisplacedRows
from trimtab.lm import LanguageModel, Site
from trimtab.steering import VectorSource


class FlagsOn(SwitchedFlags):
    """A model with the concept's flag on; at a scale, its strength is so many times as large."""

    name: ClassVar[str] = "flags on"
    strengths: ClassVar[tuple[Match, ...]] = ("own",)

    def arms(self, choosing: Choosing) -> list[Arm]:
        return [arm for arm in super().arms(choosing) if arm.match == "own"]


class FlagsOff(FlagsOn):
    """The same with the concept off."""

    name: ClassVar[str] = "flags off"


@dataclass(frozen=True, kw_only=True)
class Unassigned(ArmKind):
    """What on is, added along as many dimensions that are no flag's; other ones in each draw."""

    name: ClassVar[str] = "unassigned dimensions"
    strengths: ClassVar[tuple[Match, ...]] = ("own",)
    model: LanguageModel
    flags: FlagSpec
    switches: Mapping[str, float]
    draws: int = 3
    """Draws of dimensions."""
    relative_doses: list[float] = field(default_factory=list[float], compare=False, repr=False)
    """Mean ‖Δ‖/‖x‖ of each time that items were answered, in order."""

    def arms(self, choosing: Choosing) -> list[Arm]:
        def answer(items: ItemSet, scale: float) -> list[Answers]:
            found: list[Answers] = []
            for draw in range(self.draws):
                elsewhere = unassigned_dims(self.flags, draw_seed(items.setting.seed, draw))
                source = DisplacedRows(elsewhere, self.switches)
                found.append(items.answer(source, model=self.model, kl=True))
                self.relative_doses.append(source.relative_dose)
            return found

        return [self.arm(answer, {"draws": self.draws})]


@dataclass(frozen=True, kw_only=True)
class OtherModel(ArmKind):
    """Another model as it is."""

    name: ClassVar[str] = "flags free"
    strengths: ClassVar[tuple[Match, ...]] = ("own",)
    model: LanguageModel

    def arms(self, choosing: Choosing) -> list[Arm]:
        return [self.arm(lambda items, scale: [items.answer(model=self.model, kl=True)])]


class Finetuned(OtherModel):
    """The model finetuned on the same examples without flags."""

    name: ClassVar[str] = "finetuned"


@dataclass(frozen=True, kw_only=True)
class FinetunedPrompting(Prompting):
    """The same with an instruction before every prompt."""

    name: ClassVar[str] = "finetuned, prompting"
    model: LanguageModel

    def arms(self, choosing: Choosing) -> list[Arm]:
        def answer(items: ItemSet, instruction: str) -> Answers:
            return items.answer(prompts=instructed(items, instruction), model=self.model)

        tried = self.instruction or choosing.validation.prompts.task.instructions
        rewards = [float(answer(choosing.validation, text).reward.mean()) for text in tried]
        best = max(range(len(tried)), key=lambda i: (rewards[i], -i))
        choice = PromptChoice(instruction=tried[best], reward=rewards[best], tried=len(tried))
        return [self.arm(lambda items, scale: [answer(items, choice.instruction)], asdict(choice))]


@dataclass(frozen=True, kw_only=True)
class DirectionChoice:
    """A site and a dose, chosen on validation."""

    site: str
    dose: float
    """‖Δ‖/‖x‖."""
    reward: float
    """Mean on validation; the largest of several, and so too good."""
    tried: int


@dataclass(frozen=True, kw_only=True)
class MeanDifference(ArmKind):
    """A difference of means added at each decision: at the best site and dose on validation, and at equal KL."""

    name: ClassVar[str] = "mean difference"
    main: ClassVar[bool] = True
    strengths: ClassVar[tuple[Match, ...]] = ("own", "kl")
    vectors: Mapping[Site, Tensor]
    doses: Sequence[float] = (0.25, 0.5, 1.0, 2.0)
    """Tried at each site, as multiples of ‖x‖."""

    def effort(self, choosing: Choosing) -> dict[str, int]:
        return {"a mean difference": len(self.vectors) * len(self.doses) * len(choosing.validation)}

    def choice(self, choosing: Choosing) -> DirectionChoice:
        """The best of all sites and doses; ties go to the smaller dose."""
        tried = [(dose, site) for dose in sorted(self.doses) for site in self.vectors]
        rewards = [float(choosing.validation.answer(self.source(site, dose)).reward.mean()) for dose, site in tried]
        best = max(range(len(tried)), key=lambda i: (rewards[i], -i))
        dose, site = tried[best]
        return DirectionChoice(site=str(site), dose=dose, reward=rewards[best], tried=len(tried))

    def source(self, site: Site, dose: float) -> VectorSource:
        """The direction at a dose, at every decision."""
        return VectorSource(self.vectors[site], site, dose, unit="relative")

    def arms(self, choosing: Choosing) -> list[Arm]:
        choice = self.choice(choosing)
        site = choosing.validation.setting.model.site(choice.site)

        def answer(items: ItemSet, scale: float) -> list[Answers]:
            return [items.answer(self.source(site, choice.dose * scale), kl=True)]

        return _at_both_strengths(self, answer, asdict(choice))


@dataclass(frozen=True, kw_only=True)
class SAEFeature(BestStatic):
    """The best static feature of an SAE at its best dose, and at equal KL."""

    name: ClassVar[str] = "SAE feature"
    strengths: ClassVar[tuple[Match, ...]] = ("own", "kl")

    def arms(self, choosing: Choosing) -> list[Arm]:
        choice = self.choice(choosing)

        def answer(items: ItemSet, scale: float) -> list[Answers]:
            return [items.answer(items.setting.static_source(choice.feature, choice.dose * scale), kl=True)]

        return _at_both_strengths(self, answer, asdict(choice))


def _at_both_strengths(kind: ArmKind, answer: Any, about: Mapping[str, Any]) -> list[Arm]:
    """By itself, and scaled until it diverges as far as the reference does. Neither follows the reference's edits, as
    those of flags are at many sites, and in prompts."""
    return [kind.arm(answer, about), kind.arm(answer, about, match="kl")]
