"""Arms beside a reference on a task's items: answered once, compared in pairs, in tables and as rows of a file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Group
from rich.text import Text

import trimtab.control.arms  # noqa: F401  registers every kind
from trimtab.control.answers import ItemSet
from trimtab.control.arm import ArmKind, Choosing, Unsteered, arm_kinds
from trimtab.control.comparison_tables import arms_table, gain_line, metrics_table
from trimtab.control.plan import plan_comparison
from trimtab.control.replicates import DEFAULT_EQUAL_KL, EqualKl, Replicate, choose_arms, scheduled
from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts
from trimtab.control.task_result import AnsweredArm, TaskResult, task_result
from trimtab.errors import UserError
from trimtab.runs import Meter
from trimtab.runs.figures import Mark, plot_intervals
from trimtab.runs.results import Result
from trimtab.runs.tables import Table
from trimtab.tasks import Companion

if TYPE_CHECKING:
    from matplotlib.axes import Axes


FEW_ITEMS = 10
"""A bootstrap of fewer items does not hold its level."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Result):
    """Arms beside a reference, on a task and the tasks that must stand beside it."""

    result: TaskResult
    companions: tuple[TaskResult, ...]
    runs: tuple[str, ...]
    """The reference's trainings."""
    seeds: tuple[int, ...]
    """Theirs."""
    setting: dict[str, Any]
    """Site, dose, unit, mask."""
    settings_compared: tuple[dict[str, Any], ...] = ()
    """Every setting among those given, with its reward on validation; the best is reported."""
    missing: dict[str, str]
    """Arms and companions that are missing, and why."""
    warnings: tuple[str, ...]
    seconds: float

    @classmethod
    def of(
        cls, replicates: Sequence[Replicate], compared: Sequence[Compared], began: float, **others: Any
    ) -> Comparison:
        """What was compared on a task, which is the first, and on its companions, since a `time.perf_counter`."""
        result, *companions = (one.result for one in compared)
        return cls(
            result=result,
            companions=tuple(companions),
            runs=tuple(replicate.name for replicate in replicates),
            seeds=tuple(replicate.setting.seed for replicate in replicates),
            setting=replicates[0].setting.about,
            seconds=time.perf_counter() - began,
            **others,
        )

    def headline(self) -> str:
        result, n = self.result, len(self.seeds)
        beside = f"{result.reference} beside {len(result.arms) - 1} arms on {result.items} items of {result.task}"
        return f"{beside}, {n} training{'s' if n > 1 else ''}"

    def tables(self) -> dict[str, Table]:
        """The arms of the task and of each companion, and their tasks' own metrics."""
        found: dict[str, Table] = {}
        for result in (self.result, *self.companions):
            name = "arms" if result is self.result else result.task
            metrics = metrics_table(result)
            found |= {name: arms_table(result, self.seeds), **({f"{name}, metrics": metrics} if metrics else {})}
        return found

    def draw(self, ax: Axes) -> None:
        """The reference's paired difference to each arm, with 95% intervals over items."""
        reference = self.result.reference
        marks = [Mark(arm.label, arm.difference) for arm in self.result.arms if arm.difference is not None]
        plot_intervals(ax, marks, f"reward of {reference} minus the arm's")

    def render(self) -> Group:
        """A table for the task and each companion, and what must be said beside them."""
        parts: list[Any] = []
        for result in (self.result, *self.companions):
            metrics = metrics_table(result)
            gain = [Text(gain_line(result))] if result.reference != Unsteered.name else []
            parts += [arms_table(result, self.seeds), *gain, *([metrics] if metrics else [])]
        named = ", ".join(f"{name} {value}" for name, value in self.setting.items())
        compared = len(self.settings_compared)
        how = f"setting chosen on validation among {compared}" if compared > 1 else "setting"
        parts.append(Text(f"{how}: {named}"))
        parts += [Text(f"missing: {name} ({why})") for name, why in self.missing.items()]
        parts += [Text(f"warning: {warning}") for warning in self.warnings]
        return Group(*parts)


class Compared(NamedTuple):
    """All arms on one task's items."""

    result: TaskResult
    answered: list[AnsweredArm]
    items: list[ItemSet]
    """Each replicate's."""


def compare_on(
    replicates: Sequence[Replicate],
    prompts: TaskPrompts,
    split: str,
    *,
    companion: Companion | None = None,
    seed: int = 0,
    orders: Sequence[TaskPrompts] = (),
) -> Compared:
    """Answer a task's items under the arms of all replicates.

    Args:
        replicates: with their arms.
        prompts: the items.
        split: of which they are.
        companion: why the task stands beside another one, if it does: then only main arms do, and none at equal KL.
        seed: of the bootstrap.
        orders: the items under other orders of their options, for the main arms at their own strength.
    """
    arms = replicates[0].arms
    shown = [arm.label for arm in arms if companion is None or (arm.main and arm.match != "kl")]
    main = [arm.label for arm in arms if arm.main and arm.match == "own"]
    items, answered = _answer(replicates, prompts, shown)
    others = [_answer(replicates, other, main)[1] for other in orders]
    reference = replicates[0].reference.label
    why = "" if companion is None else companion.why
    result = task_result(
        prompts.task, split, answered, reference=reference, why=why, seed=seed, other_orders=others
    )  # fmt: skip
    return Compared(result, answered, items)


def _answer(
    replicates: Sequence[Replicate], prompts: TaskPrompts, labels: Sequence[str]
) -> tuple[list[ItemSet], list[AnsweredArm]]:
    """Answer under the arms of these labels, the reference first, since others follow its schedule."""
    items = [ItemSet.of(replicate.setting, prompts) for replicate in replicates]
    by_label = [{arm.label: arm for arm in replicate.arms} for replicate in replicates]
    reference, found = replicates[0].reference.label, dict[str, AnsweredArm]()
    for label in sorted(labels, key=lambda label: label != reference):
        replicates[0].setting.meter.describe(f"answering under {label}")
        arms = [arms_of[label] for arms_of in by_label]
        if not arms[0].per_training:
            arms = arms[:1]
        found[label] = AnsweredArm(arms, [arm.answers(some) for arm, some in zip(arms, items, strict=False)])
        if label == reference:
            pairs = zip(items, arms, found[label].runs, strict=True)
            items = [scheduled(some, arm, answers) for some, arm, (answers,) in pairs]
    return items, [found[label] for label in labels]


def compare(
    settings: Setting | Sequence[Setting],
    prompts: Mapping[str, TaskPrompts],
    arms: Sequence[str | ArmKind | type[ArmKind]],
    *,
    reference: str | ArmKind | type[ArmKind] | Sequence[ArmKind] = Unsteered.name,
    candidates: Mapping[str, Sequence[int]] | None = None,
    equal_kl: EqualKl | None = DEFAULT_EQUAL_KL,
    companions: Sequence[TaskPrompts] = (),
    every_order: bool = True,
    seed: int = 0,
) -> Comparison:
    """Choose arms on validation, match them to a reference, answer the test items, and compare in pairs.

    Args:
        settings: the ground of all arms; one for each training of the reference, which differ in their seed alone.
        prompts: items by split: `train`, `validation` and `test`, which must not share any.
        arms: names of registered kinds, or kinds with settings of their own.
        reference: what the others are compared with, and whose dose and divergence they take: a kind or its name, or
            one for each training.
        candidates: features that static arms try, the reference too, by where they come from; a sample of live ones if
            not given.
        equal_kl: how arms of equal divergence are scaled; None leaves them out.
        companions: items of the task's companions.
        every_order: where options have an order, say what is right under all of them.
        seed: of the bootstrap.

    Raises:
        UserError: there is no kind of a name, a split is missing, test items are among those that arms are chosen on,
            settings differ in more than their seeds or share one, or the reference cannot be made.
    """
    began = time.perf_counter()
    settings = [settings] if isinstance(settings, Setting) else list(settings)
    references = arm_kinds(reference)
    if lacking := sorted({"train", "validation", "test"} - set(prompts)):
        raise UserError(f"split {lacking[0]}", "a comparison needs train, validation and test", "give its items")
    _check_test_items(prompts)
    _check_settings(settings, references)
    pairs = zip(settings, references * len(settings) if len(references) == 1 else references, strict=True)
    kinds, test, given = arm_kinds(arms), prompts["test"], {companion.task.name: companion for companion in companions}
    orders = test.other_orders(settings[0].model) if every_order else []
    asked_for = plan_comparison(
        kinds, Choosing.of(settings[0], prompts, candidates), len(test), trainings=len(settings), orders=len(orders),
        kl_items=0 if equal_kl is None else equal_kl.items, companions=sum(map(len, companions)),
    )  # fmt: skip
    with Meter("comparing arms", asked_for.total) as meter:
        replicates = [
            Replicate.of(
                replace(setting, meter=meter), kind, prompts["train"], prompts["validation"], f"{kind.name} {i}",
                candidates,
            )
            for i, (setting, kind) in enumerate(pairs)
        ]  # fmt: skip
        missing = choose_arms(replicates, kinds, candidates=candidates, equal_kl=equal_kl)
        compared = [compare_on(replicates, test, "test", seed=seed, orders=orders)]
        for companion in test.task.companions:
            if companion.task in given:
                asked, split = given[companion.task], companion.split
                compared.append(compare_on(replicates, asked, split, companion=companion, seed=seed))
            else:
                missing[f"companion {companion.task}"] = f"{companion.why}; but it was not given"
    return Comparison.of(replicates, compared, began, missing=missing, warnings=few(len(settings), len(test)))


def _check_test_items(prompts: Mapping[str, TaskPrompts]) -> None:
    """Refuse to report on items that something was chosen on."""
    chosen_on = {
        (prompts[split].task.name, item.id) for split in ("train", "validation") for item in prompts[split].items
    }
    for item in prompts["test"].items:
        if (prompts["test"].task.name, item.id) in chosen_on:
            raise UserError(
                f"test item {item.id}", "it is among those that arms are chosen or trained on", "give other test items"
            )


def _check_settings(settings: Sequence[Setting], references: Sequence[ArmKind]) -> None:
    """Settings are trainings of one reference on one ground."""
    seeds = [setting.seed for setting in settings]
    if not settings or len(references) not in (1, len(settings)):
        raise UserError(
            f"{len(references)} references", f"there are {len(settings)} settings", "give one for all, or one for each"
        )
    if len(set(seeds)) < len(seeds):
        raise UserError("the settings", f"two have seed {max(seeds, key=seeds.count)}", "give each seed once")
    for setting in settings[1:]:
        for field in fields(setting):
            mine, first = (getattr(one, field.name) for one in (setting, settings[0]))
            if field.name != "seed" and field.compare and mine is not first and mine != first:
                raise UserError(
                    f"settings with {field.name} {first} and {mine}",
                    "only their seeds may differ",
                    "compare them apart",
                )


def few(trainings: int, items: int) -> tuple[str, ...]:
    """Warnings where too few trainings say how much they differ, or intervals are of too few items."""
    seeds = f"{trainings} seed{'s' if trainings > 1 else ''} only: the spread of trainings is not known"
    test = f"{items} test item{'s' if items > 1 else ''} only: intervals of fewer than {FEW_ITEMS} are too narrow"
    return (*[seeds] * (trainings < 3), *[test] * (items < FEW_ITEMS))
