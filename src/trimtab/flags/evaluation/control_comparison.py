"""Flags beside other ways of control for one concept after another, by `control`'s choice, matching and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from trimtab.control import Answers, Arm, ArmKind, Choosing, ItemSet, Setting, TaskPrompts
from trimtab.control.arm import Unsteered
from trimtab.control.arms.prompting import Prompting, instructed
from trimtab.control.comparison import compare_on
from trimtab.control.plan import plan_comparison
from trimtab.control.replicates import EqualKl, Replicate, choose_arms
from trimtab.flags.evaluation.control_arms import (
    Finetuned,
    FinetunedPrompting,
    FlagsOff,
    FlagsOn,
    MeanDifference,
    OtherModel,
    SAEFeature,
    Unassigned,
)
from trimtab.flags.evaluation.control_fit import Fitted
from trimtab.flags.evaluation.control_judging import TextReader
from trimtab.flags.evaluation.control_prompts import AGAINST, INSTRUCTIONS
from trimtab.flags.evaluation.control_task import ConceptTask
from trimtab.flags.evaluation.control_texts import ASKED, CONFLICT, NEUTRAL
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.runs import Meter
from trimtab.steering import dose_summary

REFERENCES: Mapping[str, str] = {NEUTRAL: FlagsOn.name, ASKED: FlagsOff.name, CONFLICT: FlagsOn.name}
"""What others are compared with, by the kind of prompts."""
IN_FRONTIER = (FlagsOn.name, MeanDifference.name, SAEFeature.name)
"""Ways whose strength is a number."""
CANDIDATES = "correlated with the label"
"""Where features to try come from."""


class Ground(NamedTuple):
    """What all concepts' comparisons share."""

    model: LanguageModel
    """With flags."""
    flags: FlagSpec
    setting: Setting
    """Of the original model."""
    fitted: Fitted
    plain: LanguageModel | None
    """Finetuned on the same examples without flags."""
    reader: TextReader
    words: Mapping[str, str]
    """Descriptions of the concepts."""
    validation: Sequence[str]
    test: Sequence[str]
    asking: Mapping[str, Sequence[str]]
    """Prompts that ask for each concept."""
    doses: Sequence[float]
    """Tried for mean differences."""
    strengths: Sequence[float]
    """Of the frontier."""
    features: int
    """Features of the SAE to try."""
    chat: bool
    max_new_tokens: int
    equal_kl: bool

    def prompts(self, concept: str, texts: Mapping[str, Sequence[str]]) -> dict[str, TaskPrompts]:
        """Texts of each split as prompts of the task to write about a concept."""
        task = ConceptTask(
            texts, concept, self.reader, chat=self.chat, max_new_tokens=self.max_new_tokens,
            instructions=[text.format(self.words[concept]) for text in INSTRUCTIONS],
        )  # fmt: skip
        return {split: TaskPrompts.of(self.setting.model, task, task.items(split)) for split in texts}

    def neutral(self, concept: str) -> dict[str, TaskPrompts]:
        """Neutral prompts to choose on and to report."""
        return self.prompts(concept, {"validation": self.validation, "test": self.test})

    def asked(self, concept: str, asking: str) -> ItemSet:
        """Prompts that ask for one concept, read for another one or the same."""
        return ItemSet.of(self.setting, self.prompts(concept, {"test": self.asking[asking]})["test"])

    def other(self, concept: str) -> str:
        """The concept that conflicting prompts ask for while this one is wanted; itself where there is no other."""
        return self.flags.concepts[self.flags.index(concept) - 1]


class ConceptAnswers(NamedTuple):
    """Answers of one concept's ways of control."""

    answers: dict[tuple[str, str], list[Answers]]
    """By the kind of prompts and the way's label; several where something is drawn."""
    chosen: dict[str, Mapping[str, Any]]
    doses: dict[str, float]
    """Mean ‖Δ‖/‖x‖ on neutral prompts, of those that edit."""
    frontier: dict[tuple[str, float], list[Answers]]
    missing: dict[str, str]


def compare_concepts(ground: Ground, concepts: Sequence[str]) -> dict[str, ConceptAnswers]:
    """Compare all ways of control for each of some concepts."""
    with Meter("comparing ways of control") as meter:
        ground = ground._replace(setting=replace(ground.setting, meter=meter))
        meter.total = _effort(ground, concepts[0]) * len(concepts)
        return {concept: compare_for(ground, concept) for concept in concepts}


def kinds_of(ground: Ground, concept: str) -> list[ArmKind]:
    """Every way of control that can be had for a concept, flags on first."""
    model, flags = ground.model, ground.flags
    found: list[ArmKind] = [
        FlagsOn(model=model, flags=flags, switches={concept: 1.0}),
        FlagsOff(model=model, flags=flags, switches={concept: 0.0}),
        OtherModel(model=model),
        Unassigned(model=model, flags=flags, switches={concept: 1.0}),
        MeanDifference(vectors=ground.fitted.directions[concept], doses=tuple(ground.doses)),
    ]
    if ground.setting.dictionary is not None:
        found.append(SAEFeature(finalists=ground.features))
    found.append(Prompting())
    if ground.plain is not None:
        found += [Finetuned(model=ground.plain), FinetunedPrompting(model=ground.plain)]
    return found


def compare_for(ground: Ground, concept: str) -> ConceptAnswers:
    """Choose on validation, match flags' divergence there, and answer the test prompts and those that ask."""
    prompts, (reference, *kinds) = ground.neutral(concept), kinds_of(ground, concept)
    candidates = {CANDIDATES: ground.fitted.features[concept]}
    validation = prompts["validation"]
    replicate = Replicate.of(ground.setting, reference, validation, validation, reference.name, candidates)
    equal_kl = EqualKl(items=len(validation)) if ground.equal_kl else None
    missing = choose_arms([replicate], kinds, candidates=candidates, equal_kl=equal_kl)
    missing.pop("arms at equal dose and equal KL", None)  # none of these follows the reference's edits
    compared = compare_on([replicate], prompts["test"], "test", seed=ground.setting.seed)
    answers = {one.arm.label: one.runs[0] for one in compared.answered}
    doses = {label: dose_summary(one.edits).relative for label, (one, *_) in answers.items() if len(one.edits)}
    for kind in (reference, *kinds):
        if isinstance(kind, FlagsOn | Unassigned):
            doses[kind.name] = float(np.mean(kind.relative_doses[-kind.draws :]))
    own = {arm.name: arm for arm in replicate.arms if arm.match == "own"}
    frontier: dict[tuple[str, float], list[Answers]] = {}
    for name in IN_FRONTIER:
        for scale in ground.strengths if name in own else ():
            if scale == 1:
                frontier[name, scale] = answers[name]
            elif scale == 0 and name != FlagsOn.name:
                frontier[name, scale] = answers[Unsteered.name]
            else:
                frontier[name, scale] = own[name].answer(compared.items[0], scale)
    found = {(NEUTRAL, label): mine for label, mine in answers.items()}
    found |= {(ASKED, label): mine for label, mine in _suppressing(ground, concept, own).items()}
    if ground.other(concept) != concept:
        found |= {(CONFLICT, label): mine for label, mine in _conflicting(ground, concept, own).items()}
    chosen: dict[str, Mapping[str, Any]] = {
        arm.label: {**arm.chosen, **({"scale": arm.scale} if arm.match == "kl" else {})} for arm in replicate.arms
    }
    return ConceptAnswers(found, chosen, doses, frontier, missing)


def _suppressing(ground: Ground, concept: str, own: Mapping[str, Arm]) -> dict[str, list[Answers]]:
    """What each way writes that is to keep a concept away where prompts ask for it."""
    items = ground.asked(concept, concept)
    still = (FlagsOff.name, Unsteered.name, OtherModel.name, Finetuned.name)
    found = {name: own[name].answers(items) for name in still if name in own}
    for name in (MeanDifference.name, SAEFeature.name):
        if name in own:
            found[f"{name}, subtracted"] = own[name].answer(items, -1.0)
    against = instructed(items, AGAINST.format(ground.words[concept]))
    found[Prompting.name] = [items.answer(prompts=against)]
    if ground.plain is not None:
        found[FinetunedPrompting.name] = [items.answer(prompts=against, model=ground.plain)]
    return found


def _conflicting(ground: Ground, concept: str, own: Mapping[str, Arm]) -> dict[str, list[Answers]]:
    """What each way writes that is to bring a concept about where prompts ask for another one."""
    other = ground.other(concept)
    items = ground.asked(concept, other)
    switched = FlagsOn(model=ground.model, flags=ground.flags)
    found = {FlagsOn.name: [switched.answer(items, ground.flags, {concept: 1.0, other: 0.0})]}
    ways = (Unsteered, OtherModel, MeanDifference, SAEFeature, Prompting, Finetuned, FinetunedPrompting)
    return found | {way.name: own[way.name].answers(items) for way in ways if way.name in own}


def _effort(ground: Ground, concept: str) -> int:
    """Texts of one concept's comparison, at most."""
    prompts, kinds = ground.neutral(concept), kinds_of(ground, concept)
    candidates = {CANDIDATES: ground.fitted.features[concept]}
    choosing = Choosing.of(ground.setting, {"train": prompts["validation"], **prompts}, candidates)
    n, few = len(prompts["test"]), len(prompts["validation"])
    plan = plan_comparison(kinds[1:], choosing, n, kl_items=few if ground.equal_kl else 0)
    in_frontier = sum(kind.name in IN_FRONTIER for kind in kinds)
    asked = int(np.mean([len(texts) for texts in ground.asking.values()]))
    return plan.total + in_frontier * n * len(ground.strengths) + 2 * asked * len(kinds)
