"""What an evaluation of a policy says: every arm's numbers with intervals, and the policy's paired difference to it.

Intervals are bootstrapped over items, seeds (runs, draws of a random control) inside their item: they are of these
trained policies. What another training would give is less certain: where several runs were trained, differences come
with a second interval that resamples runs as well ("over trainings").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Group

from trimtab.control.answers import Answers
from trimtab.policies.arms import MAIN, Arm, mean_kl
from trimtab.runs import json_safe
from trimtab.stats import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio_of_sums,
    bootstrap_statistic,
)
from trimtab.steering import DoseSummary, UnequalDoseError, assert_equal_dose, dose_summary
from trimtab.tasks import Outcome, Task, known_under_every_order

KL_AGREES = 0.1
"""Relative difference of divergences on the reported items up to which they count as equal."""
METRIC_RESAMPLES = 1_000


class AnsweredArm(NamedTuple):
    """An arm and what came of it, by run; an arm that no run changes was played once."""

    arms: list[Arm]
    """Each run's."""
    runs: list[list[Answers]]

    @property
    def arm(self) -> Arm:
        """The first run's, whose name and kind all share."""
        return self.arms[0]

    @property
    def outcomes(self) -> list[list[Outcome]]:
        """One list of outcomes per run and draw."""
        return [played.outcomes for run in self.runs for played in run]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The policy's gain over the unsteered model, in two parts that add up to it."""

    total: Interval
    over_runs: Interval | None
    """The total, runs resampled as well as items; None for a single run."""
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
    """Mean reward of each run and draw."""
    reward_over_runs: Interval | None
    """The same reward, runs resampled as well as items; None where the arm was played once."""
    accuracy: Interval | None
    """None where a task has no right and wrong."""
    accuracy_well_formed: Interval | None
    """Share of right answers among those that are well formed."""
    malformed: Interval
    difference: Interval | None
    """Reward of the policy minus this arm's, paired by item; None for the policy itself."""
    difference_by_run: tuple[float, ...]
    """The same for each run."""
    difference_over_runs: Interval | None
    """The same, runs resampled as well as items; None for a single run."""
    kl: float | None
    """Mean KL to the unsteered model, in nats per answer."""
    equal_kl: bool | None
    """Whether that is within 10% of the policy's on these items, too; None if not claimed. Doses were scaled on
    validation."""
    dose: DoseSummary | None
    """Realised doses over all runs and draws."""
    equal_dose: bool | None
    """Whether mean ‖Δ‖/‖x‖ and the number of edits are within 1% of the policy's in every run; None if not claimed."""
    dose_note: str
    """Where they are not: both numbers."""
    kl_matches: tuple[dict[str, Any], ...]
    """Per run, what the search for equal KL came to on validation."""
    chosen: tuple[dict[str, Any], ...]
    """Per run, how the arm was chosen or trained."""
    known: Interval | None
    """Share of items that are right under every cyclic order of their options: a liking for a letter is no knowledge.
    None where options have no order, or the arm was not played under all."""
    known_difference: Interval | None
    """The policy's minus this arm's."""
    metrics: dict[str, float]
    """The task's own summary over all runs and draws."""
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
        """An arm by its label."""
        return next(arm for arm in self.arms if arm.label == label)


@dataclass(frozen=True, kw_only=True)
class PolicyEvaluation:
    """A policy beside its controls."""

    result: TaskResult
    companions: tuple[TaskResult, ...]
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    setting: dict[str, Any]
    """Site, dose, unit, mask of the runs that are reported."""
    settings_compared: tuple[dict[str, Any], ...]
    """Every setting among the runs given, with its reward on validation; the best is reported."""
    missing: dict[str, str]
    """Controls and companions that could not be had, and why."""
    warnings: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; intervals as dicts."""
        return json_safe(asdict(self))

    def render(self) -> Group:
        """A table for the task and each companion, and what must be said beside them."""
        from trimtab.policies.evaluation_tables import rendered  # it needs these classes

        return rendered(self)


def task_result(
    task: Task,
    split: str,
    played: Sequence[AnsweredArm],
    *,
    why: str = "",
    seed: int = 0,
    other_orders: Sequence[Sequence[AnsweredArm]] = (),
) -> TaskResult:
    """Summarise all arms on a task's items.

    Args:
        task: the task.
        split: of which the items are.
        played: the arms, among them `unsteered` and `policy`.
        why: why the task stands beside another.
        seed: of the bootstrap.
        other_orders: some of the arms, `policy` among them, under each other cyclic order of the options.
    """
    by_label = {one.arm.label: one for one in played}
    policy = by_label["policy"]
    known = _known_by_arm(by_label, other_orders)
    arms = tuple(_arm_result(task, one, policy, known, seed) for one in played)
    return TaskResult(
        task=task.name,
        split=split,
        metric=task.metric,
        items=len(policy.outcomes[0]),
        arms=arms,
        gain=_gain(by_label["unsteered"], policy, seed),
        why=why,
    )


def _known_by_arm(
    by_label: Mapping[str, AnsweredArm], other_orders: Sequence[Sequence[AnsweredArm]]
) -> dict[str, NDArray[np.float64]]:
    """Per arm played under all orders, [P] the share of runs and draws in which an item is right under each of them."""
    found: dict[str, NDArray[np.float64]] = {}
    for place, first in enumerate(other_orders[0] if other_orders else ()):
        label = first.arm.label
        orders = [by_label[label], *(order[place] for order in other_orders)]
        per_play = zip(*(one.outcomes for one in orders), strict=True)
        known = np.array([known_under_every_order(plays) for plays in per_play], dtype=np.float64)
        found[label] = known.mean(0)
    return found


def _arm_result(
    task: Task, one: AnsweredArm, policy: AnsweredArm, known: Mapping[str, NDArray[np.float64]], seed: int
) -> ArmResult:
    reward, malformed = _array(one, _reward), _array(one, _malformed)
    correct = None
    if all(o.correct is not None for outcomes in one.outcomes for o in outcomes):
        correct = _array(one, lambda o: float(bool(o.correct)))
    difference, by_run = None, np.empty((0, 0))
    if one is not policy:
        difference = bootstrap_difference(_by_run(policy, one), _by_run(one, policy), seed=seed)
        by_run = _runs(policy) - _runs(one)
    kls = [mean_kl(run) for run in one.runs]
    logs = [played.edits for run in one.runs for played in run]
    equal, note = _equal_dose(one, policy)
    return ArmResult(
        name=one.arm.name,
        label=one.arm.label,
        match=one.arm.match,
        reward=bootstrap_mean(reward, seed=seed),
        by_seed=tuple(reward.mean(1).tolist()),
        reward_over_runs=_over_runs(_runs(one), seed),
        accuracy=None if correct is None else bootstrap_mean(correct, seed=seed),
        accuracy_well_formed=None if correct is None else _well_formed(correct, malformed, seed),
        malformed=bootstrap_mean(malformed, seed=seed),
        difference=difference,
        difference_by_run=tuple(by_run.mean(1).tolist()) if len(by_run) else (),
        difference_over_runs=_over_runs(by_run, seed),
        kl=None if math.isnan(float(np.mean(kls))) else float(np.mean(kls)),
        dose=_pooled([dose_summary(log) for log in logs]) if any(len(log) for log in logs) else None,
        equal_kl=_equal_kl(one, policy),
        equal_dose=equal,
        dose_note=note,
        kl_matches=tuple(arm.kl.to_json() for arm in one.arms if arm.kl is not None),
        chosen=tuple(arm.chosen for arm in one.arms if arm.chosen),
        known=bootstrap_mean(known[one.arm.label], seed=seed) if one.arm.label in known else None,
        known_difference=bootstrap_difference(known["policy"], known[one.arm.label], seed=seed)
        if one.arm.label in known and one is not policy
        else None,
        metrics=task.summarise([o for outcomes in one.outcomes for o in outcomes]),
        metric_intervals=_metric_intervals(task, one, seed) if one.arm.name in MAIN and one.arm.match != "kl" else {},
    )


def _reward(outcome: Outcome) -> float:
    return float(outcome.reward)


def _malformed(outcome: Outcome) -> float:
    return float(outcome.malformed)


def _array(one: AnsweredArm, value: Any) -> NDArray[np.float64]:
    """[S, P]: a number of every outcome, one row per run and draw."""
    return np.array([[value(o) for o in outcomes] for outcomes in one.outcomes], dtype=np.float64)


def _by_run(one: AnsweredArm, other: AnsweredArm) -> NDArray[np.float64]:
    """[runs, P] mean rewards over draws; one row if either arm was played once for all runs."""
    rows = _runs(one)
    return rows if len(one.runs) == len(other.runs) else rows.mean(0, keepdims=True)


def _runs(one: AnsweredArm) -> NDArray[np.float64]:
    """[runs, P] mean rewards over draws."""
    return np.array([np.mean([played.reward for played in run], axis=0) for run in one.runs])


def _over_runs(rewards: NDArray[np.float64], seed: int) -> Interval | None:
    """An interval that resamples runs as well as items: each run is one training, which all items share."""
    return bootstrap_mean(rewards, seed=seed, seeds="crossed") if len(rewards) > 1 else None


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


def _equal_kl(one: AnsweredArm, policy: AnsweredArm) -> bool | None:
    if one.arm.match != "kl":
        return None
    found, wanted = (float(np.mean([mean_kl(run) for run in arm.runs])) for arm in (one, policy))
    return abs(found - wanted) <= KL_AGREES * wanted


def _well_formed(correct: NDArray[np.float64], malformed: NDArray[np.float64], seed: int) -> Interval | None:
    formed = 1 - malformed
    if formed.sum() == 0:
        return None
    return bootstrap_ratio_of_sums((correct * formed).sum(0), formed.sum(0), seed=seed)


def _equal_dose(one: AnsweredArm, policy: AnsweredArm) -> tuple[bool | None, str]:
    if one.arm.match != "dose":
        return None, ""
    for run, reference in zip(one.runs, policy.runs, strict=True):
        for played in run:
            try:
                assert_equal_dose({"the policy": reference[0].edits, one.arm.name: played.edits})
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


def _gain(unsteered: AnsweredArm, policy: AnsweredArm, seed: int) -> Gain:
    base_reward, base_malformed = (_array(unsteered, value).mean(0) for value in (_reward, _malformed))
    difference = _array(policy, _reward) - base_reward
    # The unsteered arm is played once; its malformed answers are 0 or 1.
    changed = _array(policy, _malformed) != base_malformed
    return Gain(
        total=bootstrap_mean(difference, seed=seed),
        over_runs=_over_runs(difference, seed),
        format=bootstrap_mean(np.where(changed, difference, 0), seed=seed),
        answer=bootstrap_mean(np.where(changed, 0, difference), seed=seed),
    )
