"""Choose the arms to compare, on train and validation alone: once for all trainings of the reference, or for each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from trimtab.control.answers import Answers, EditSchedule, ItemSet, mean_kl
from trimtab.control.arm import Arm, ArmKind, Choosing, Unsteered
from trimtab.control.dose_search import match_kl
from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts
from trimtab.errors import UserError


class EqualKl(NamedTuple):
    """How arms of equal divergence are scaled."""

    items: int = 64
    """Validation items to measure it on."""
    tolerance: float = 0.05
    """Relative difference of mean divergences that counts as equal."""


DEFAULT_EQUAL_KL = EqualKl()


@dataclass(kw_only=True)
class Replicate:
    """One training of the reference with its setting, and the arms that are compared with it."""

    setting: Setting
    kind: ArmKind
    """The reference's."""
    reference: Arm
    train: ItemSet
    validation: ItemSet
    """With the reference's schedule."""
    answers: Answers
    """The reference's answers to the validation items."""
    name: str = ""
    arms: list[Arm] = field(default_factory=list)
    """The unsteered model, the reference, and the arms compared with it."""

    @classmethod
    def of(
        cls,
        setting: Setting,
        reference: ArmKind,
        train: TaskPrompts,
        validation: TaskPrompts,
        name: str = "",
        candidates: Mapping[str, Sequence[int]] | None = None,
    ) -> Replicate:
        """Answer the validation items under a reference, chosen among candidates if it is a static one.

        Raises:
            UserError: the reference cannot be made, or draws at random.
        """
        asked, checked = ItemSet.of(setting, train), ItemSet.of(setting, validation)
        choosing = Choosing(train=asked, validation=checked, candidates=candidates or {})
        own = [arm for arm in reference.arms(choosing) if arm.match == "own"]
        if not own:
            raise UserError(f"reference {reference.name}", "it has no strength of its own", "choose another one")
        arm = replace(own[0], main=True, per_training=True)
        answers = arm.answers(checked)
        if len(answers) > 1:
            raise UserError(f"reference {reference.name}", "it draws at random", "choose another one")
        return cls(
            setting=setting, kind=reference, reference=arm, train=asked, validation=scheduled(checked, arm, answers[0]),
            answers=answers[0], name=name,
        )  # fmt: skip

    @property
    def edits(self) -> bool:
        """Whether the reference edits any validation item."""
        return self.validation.schedule is not None and self.validation.schedule.edits > 0


def scheduled(items: ItemSet, reference: Arm, answers: Answers) -> ItemSet:
    """Items with what a reference did with them; the unsteered model gives no schedule."""
    if reference.name == Unsteered.name or answers.decoded is None:
        return items
    return replace(items, schedule=EditSchedule.of(answers))


def choose_arms(
    replicates: Sequence[Replicate],
    kinds: Iterable[ArmKind],
    *,
    candidates: Mapping[str, Sequence[int]] | None = None,
    equal_kl: EqualKl | None = DEFAULT_EQUAL_KL,
) -> dict[str, str]:
    """Choose, train and scale the arms of every replicate, on its training and validation items.

    Args:
        replicates: get their arms.
        kinds: what is compared with the reference.
        candidates: features to try, by where they come from.
        equal_kl: how arms of equal divergence are scaled; None leaves them out.

    Returns:
        Arms that could not be made, and why.

    Raises:
        UserError: two kinds have the same name.
    """
    missing: dict[str, str] = {}
    name = replicates[0].reference.name
    kinds = [kind for kind in kinds if kind.name != Unsteered.name]
    if any(kind.name == name and kind != replicates[0].kind for kind in kinds):
        missing[f"another {name}"] = "the reference has this name"
    kinds = [kind for kind in kinds if kind.name != name]
    if doubled := [kind for kind, n in Counter(kind.name for kind in kinds).items() if n > 1]:
        raise UserError(
            f"arm {doubled[0]!r}", "two kinds of arms have this name", "leave one out, or name it otherwise"
        )
    every = [
        Choosing(train=r.train, validation=r.validation, reference=r.kind, candidates=candidates or {})
        for r in replicates
    ]
    shared = {kind.name: _arms(kind, every[0], missing) for kind in kinds if not kind.per_training}
    for replicate, choosing in zip(replicates, every, strict=True):
        if not replicate.edits:
            missing["arms at equal dose and equal KL"] = f"{name} edits none of the validation items"
        arms = [*Unsteered().arms(choosing)] if name != Unsteered.name else []
        arms.append(replicate.reference)
        for kind in kinds:
            arms += shared[kind.name] if kind.name in shared else _arms(kind, choosing, missing)
        replicate.arms = _matched(replicate, arms, equal_kl, missing)
    common = set.intersection(*({arm.label for arm in replicate.arms} for replicate in replicates))
    for replicate in replicates:
        for arm in replicate.arms:
            if arm.label not in common:
                missing[arm.label] = "it could not be made in every run"
        replicate.arms = [arm for arm in replicate.arms if arm.label in common]
    return missing


def _arms(kind: ArmKind, choosing: Choosing, missing: dict[str, str]) -> list[Arm]:
    choosing.train.setting.meter.describe(f"choosing {kind.name}")
    try:
        return kind.arms(choosing)
    except UserError as error:
        missing[kind.name] = f"{error.what}: {error.why}"
        return []


def _matched(replicate: Replicate, arms: Sequence[Arm], equal_kl: EqualKl | None, missing: dict[str, str]) -> list[Arm]:
    """The arms that the reference's edits allow, those of equal KL at the scale that validation items ask for.

    Each is tried on validation, so that what cannot take the reference's strength shows before a test item is answered.
    """
    arms = [arm for arm in arms if replicate.edits or not arm.scheduled]
    arms = [arm for arm in arms if equal_kl is not None or arm.match != "kl"]
    replicate.setting.meter.describe("matching dose and KL")
    n = len(replicate.validation)
    few = replicate.validation.take(range(min(DEFAULT_EQUAL_KL.items if equal_kl is None else equal_kl.items, n)))
    target = mean_kl(replicate.reference.answers(few)) if any(arm.match == "kl" for arm in arms) else 0.0
    found = []
    for arm in arms:
        try:
            if arm.match == "kl" and target > 0:
                assert equal_kl is not None
                replicate.setting.meter.describe(f"scaling {arm.label}")
                found.append(scale_to_kl(arm, few, target, tolerance=equal_kl.tolerance))
            elif arm.match != "kl":
                if arm.match == "dose":
                    arm.answers(few.take([0]))
                found.append(arm)
            elif replicate.edits:
                why = "changes no distribution" if target == 0 else "does not measure its divergence"
                missing[arm.label] = f"{replicate.reference.name} {why} on validation"
        except UserError as error:
            missing[arm.label] = f"{error.what}: {error.why}"
    return found


def scale_to_kl(arm: Arm, validation: ItemSet, target: float, *, tolerance: float) -> Arm:
    """The arm with its doses scaled to a mean divergence on validation items.

    Raises:
        UserError: its answers say nothing of their divergence.
    """

    def divergence(scale: float) -> float:
        kl = mean_kl(arm.answer(validation, scale))
        if math.isnan(kl):
            raise UserError("equal KL", "its answers do not measure their divergence", "answer with kl=True")
        return kl

    found = match_kl(divergence, target, tolerance=tolerance)
    return replace(arm, scale=found.scale, kl=found)
