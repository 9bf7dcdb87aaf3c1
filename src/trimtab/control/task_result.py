"""What a comparison says of a task: every arm's numbers with intervals, and the reference's paired difference to it.

Intervals are bootstrapped over items, seeds (trainings, draws of a random arm) inside their item: they are of these
trainings of the reference. What another training would give is less certain: where several were trained, differences
come with a second interval, of other trainings as well as other items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.control.answers import Answers, mean_kl
from trimtab.control.arm import Arm
from trimtab.errors import named
from trimtab.stats import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio_of_sums,
    bootstrap_statistic,
    crossed_mean,
)
from trimtab.steering import DoseSummary, UnequalDoseError, assert_equal_dose, dose_summary
from trimtab.tasks import Outcome, Task, known_under_every_order

KL_AGREES = 0.1
"""Relative difference of divergences on the reported items up to which they count as equal."""
METRIC_RESAMPLES = 1_000


class AnsweredArm(NamedTuple):
    """An arm and its answers, one list per training of the reference; one that no training changes answers once."""

    arms: list[Arm]
    """Each training's."""
    runs: list[list[Answers]]

    @property
    def arm(self) -> Arm:
        """The first training's, whose name and kind all share."""
        return self.arms[0]

    @property
    def outcomes(self) -> list[list[Outcome]]:
        """One list of outcomes per training and draw."""
        return [answers.outcomes for run in self.runs for answers in run]

    @property
    def rewards(self) -> NDArray[np.float64]:
        """`[trainings, P]`, means over draws."""
        return np.array([np.mean([answers.reward for answers in run], axis=0) for run in self.runs])

    @property
    def kl(self) -> float:
        """Mean KL to the unsteered model, in nats per answer; NaN where it was not measured."""
        return float(np.mean([mean_kl(run) for run in self.runs]))

    def each(self, value: Callable[[Outcome], float | bool | None]) -> NDArray[np.float64]:
        """`[S, P]`, a number of every outcome, one row per training and draw."""
        return np.array([[value(o) for o in outcomes] for outcomes in self.outcomes], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The reference's gain over the unsteered model, in two parts that add up to it."""

    total: Interval
    over_runs: Interval | None
    """The total with an interval of other trainings as well as items; None for a single one."""
    format: Interval
    """From items of which one answer is malformed and the other is not."""
    answer: Interval
    """From items whose answers are both well formed, or both malformed."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm's numbers."""

    name: str
    label: str
    match: str
    """`own`, `dose` or `kl`: what its strength equals."""
    reward: Interval
    by_seed: tuple[float, ...]
    """Mean reward of each training and draw."""
    reward_over_runs: Interval | None
    """The same reward with an interval of other trainings as well as items; None where the arm answered once."""
    accuracy: Interval | None
    """None where a task has no right and wrong."""
    accuracy_well_formed: Interval | None
    """Share of right answers among those that are well formed."""
    malformed: Interval
    difference: Interval | None
    """Reward of the reference minus this arm's, paired by item; None for the reference itself."""
    difference_by_run: tuple[float, ...]
    """The same for each training."""
    difference_over_runs: Interval | None
    """The same with an interval of other trainings as well as items; None for a single one."""
    kl: float | None
    """Mean KL to the unsteered model, in nats per answer."""
    equal_kl: bool | None
    """Whether that is within 10% of the reference's on these items, too; None if not claimed. Doses were scaled
    on validation."""
    dose: DoseSummary | None
    """Realised doses over all trainings and draws."""
    equal_dose: bool | None
    """Whether mean ‖Δ‖/‖x‖ and the number of edits are within 1% of the reference's in every training; None if not
    claimed."""
    dose_note: str
    """Where they are not: both numbers."""
    kl_matches: tuple[dict[str, Any], ...]
    """Per training, what the search for equal KL came to on validation."""
    chosen: tuple[dict[str, Any], ...]
    """Per training, how the arm was chosen or trained."""
    known: Interval | None
    """Share of items that are right under every cyclic order of their options: a liking for a letter is no knowledge.
    None where options have no order, or the arm did not answer under all."""
    known_difference: Interval | None
    """The reference's minus this arm's."""
    metrics: dict[str, float]
    """The task's own summary over all trainings and draws."""
    metric_intervals: dict[str, Interval]
    """Of those that the task shows beside the reward, bootstrapped over items; main arms only."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """All arms on the items of one task's split."""

    task: str
    split: str
    metric: str
    items: int
    arms: tuple[ArmResult, ...]
    gain: Gain
    why: str = ""
    """Why a companion stands beside the task."""

    def arm(self, label: str) -> ArmResult:
        """An arm by its label. Raises a `UserError` that says which there are if there is none of it."""
        return named({arm.label: arm for arm in self.arms}, label, "arm")

    @property
    def reference(self) -> str:
        """What the others are compared with."""
        return next(arm.label for arm in self.arms if arm.difference is None)


def task_result(
    task: Task,
    split: str,
    answered: Sequence[AnsweredArm],
    *,
    reference: str,
    why: str = "",
    seed: int = 0,
    other_orders: Sequence[Sequence[AnsweredArm]] = (),
) -> TaskResult:
    """Summarise all arms on a task's items.

    Args:
        task: the task.
        split: of which the items are.
        answered: the arms, among them `unsteered` and the reference.
        reference: label of the arm that the others are compared with.
        why: why the task stands beside another.
        seed: of the bootstrap.
        other_orders: some of the arms, the reference among them, under each other cyclic order of the options.
    """
    by_label = {one.arm.label: one for one in answered}
    first = by_label[reference]
    known = _known_by_arm(by_label, other_orders)
    arms = tuple(_arm_result(task, one, first, known, seed) for one in answered)
    return TaskResult(
        task=task.name,
        split=split,
        metric=task.metric,
        items=len(first.outcomes[0]),
        arms=arms,
        gain=_gain(by_label["unsteered"], first, seed),
        why=why,
    )


def _known_by_arm(
    by_label: Mapping[str, AnsweredArm], other_orders: Sequence[Sequence[AnsweredArm]]
) -> dict[str, NDArray[np.float64]]:
    """Per arm under all orders, [P] the share of trainings and draws in which an item is right under each of them."""
    found: dict[str, NDArray[np.float64]] = {}
    for place, first in enumerate(other_orders[0] if other_orders else ()):
        label = first.arm.label
        orders = [by_label[label], *(order[place] for order in other_orders)]
        draws = zip(*(one.outcomes for one in orders), strict=True)
        found[label] = np.array([known_under_every_order(draw) for draw in draws], dtype=np.float64).mean(0)
    return found


def _arm_result(
    task: Task, one: AnsweredArm, reference: AnsweredArm, known: Mapping[str, NDArray[np.float64]], seed: int
) -> ArmResult:
    arm = one.arm
    reward, malformed = one.each(lambda o: o.reward), one.each(lambda o: o.malformed)
    judged = all(o.correct is not None for outcomes in one.outcomes for o in outcomes)
    correct = one.each(lambda o: o.correct) if judged else None
    difference, by_run, known_difference = None, np.empty((0, 0)), None
    if one is not reference:
        difference = bootstrap_difference(reference.rewards, one.rewards, seed=seed)
        by_run = reference.rewards - one.rewards
        if arm.label in known:
            known_difference = bootstrap_difference(known[reference.arm.label], known[arm.label], seed=seed)
    logs = [answers.edits for run in one.runs for answers in run]
    equal, note = _equal_dose(one, reference)
    return ArmResult(
        name=arm.name,
        label=arm.label,
        match=arm.match,
        reward=bootstrap_mean(reward, seed=seed),
        by_seed=tuple(reward.mean(1).tolist()),
        reward_over_runs=_over_runs(one.rewards),
        accuracy=None if correct is None else bootstrap_mean(correct, seed=seed),
        accuracy_well_formed=None if correct is None else _well_formed(correct, malformed, seed),
        malformed=bootstrap_mean(malformed, seed=seed),
        difference=difference,
        difference_by_run=tuple(by_run.mean(1).tolist()) if len(by_run) else (),
        difference_over_runs=_over_runs(by_run),
        kl=None if math.isnan(one.kl) else one.kl,
        dose=_pooled([dose_summary(log) for log in logs]) if any(len(log) for log in logs) else None,
        equal_kl=abs(one.kl - reference.kl) <= KL_AGREES * reference.kl if arm.match == "kl" else None,
        equal_dose=equal,
        dose_note=note,
        kl_matches=tuple(asdict(arm.kl) for arm in one.arms if arm.kl is not None),
        chosen=tuple(dict(arm.chosen) for arm in one.arms if arm.chosen),
        known=bootstrap_mean(known[arm.label], seed=seed) if arm.label in known else None,
        known_difference=known_difference,
        metrics=task.summarise([o for outcomes in one.outcomes for o in outcomes]),
        metric_intervals=_metric_intervals(task, one, seed) if arm.main and arm.match != "kl" else {},
    )


def _over_runs(rewards: NDArray[np.float64]) -> Interval | None:
    """An interval of other trainings and other items: all items share a training."""
    return crossed_mean(rewards) if len(rewards) > 1 else None


def _metric_intervals(task: Task, one: AnsweredArm, seed: int) -> dict[str, Interval]:
    """The task's shown metrics, whole items resampled with all their outcomes."""
    outcomes, items = one.outcomes, np.arange(len(one.outcomes[0]))

    def metric(name: str, picked: NDArray[np.intp]) -> float:
        return task.summarise([run[i] for run in outcomes for i in picked]).get(name, math.nan)

    found = {
        name: bootstrap_statistic(partial(metric, name), [items], n_resamples=METRIC_RESAMPLES, seed=seed)
        for name in task.shown_metrics
    }
    return {name: interval for name, interval in found.items() if not math.isnan(interval.estimate)}


def _well_formed(correct: NDArray[np.float64], malformed: NDArray[np.float64], seed: int) -> Interval | None:
    formed = 1 - malformed
    if formed.sum() == 0:
        return None
    return bootstrap_ratio_of_sums((correct * formed).sum(0), formed.sum(0), seed=seed)


def _equal_dose(one: AnsweredArm, reference: AnsweredArm) -> tuple[bool | None, str]:
    if one.arm.match != "dose":
        return None, ""
    for run, (wanted,) in zip(one.runs, reference.runs, strict=True):
        for answers in run:
            try:
                assert_equal_dose({f"the {reference.arm.name}": wanted.edits, one.arm.name: answers.edits})
            except UnequalDoseError as error:
                return False, str(error)
    return True, ""


def _pooled(doses: Sequence[DoseSummary]) -> DoseSummary:
    edits = np.array([d.n_edits for d in doses], dtype=np.float64)
    weight = edits / max(1.0, edits.sum())
    used = [d for d in doses if d.n_edits] or list(doses)
    return DoseSummary(
        n_edits=int(edits.sum()),
        n_tokens=sum(d.n_tokens for d in doses),
        relative=float(weight @ [d.relative for d in doses]),
        relative_min=min(d.relative_min for d in used),
        relative_max=max(d.relative_max for d in used),
        absolute=float(weight @ [d.absolute for d in doses]),
    )


def _gain(unsteered: AnsweredArm, reference: AnsweredArm, seed: int) -> Gain:
    difference = reference.each(lambda o: o.reward) - unsteered.each(lambda o: o.reward).mean(0)
    # The unsteered arm answers once; its malformed answers are 0 or 1.
    changed = reference.each(lambda o: o.malformed) != unsteered.each(lambda o: o.malformed).mean(0)
    return Gain(
        total=bootstrap_mean(difference, seed=seed),
        over_runs=_over_runs(difference),
        format=bootstrap_mean(np.where(changed, difference, 0), seed=seed),
        answer=bootstrap_mean(np.where(changed, 0, difference), seed=seed),
    )
