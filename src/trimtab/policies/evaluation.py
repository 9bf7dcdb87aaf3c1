"""What an evaluation of a policy says: every arm's numbers with intervals, and the policy's paired difference to it.

Intervals are bootstrapped over items; seeds (runs, draws of a random control) stay inside their item.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from trimtab.policies.controls.arms import Arm, mean_kl
from trimtab.policies.controls.scene import Played
from trimtab.policies.tables import add_columns
from trimtab.runs import json_safe
from trimtab.stats import Interval, bootstrap_difference, bootstrap_mean, bootstrap_ratio_of_sums
from trimtab.steering import DoseSummary, UnequalDoseError, assert_equal_dose, dose_summary
from trimtab.tasks import Outcome, Task


class PlayedArm(NamedTuple):
    """An arm and what came of it, by run; an arm that no run changes was played once."""

    arms: list[Arm]
    """Each run's."""
    runs: list[list[Played]]

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
    accuracy: Interval | None
    """None where a task has no right and wrong."""
    accuracy_well_formed: Interval | None
    """Share of right answers among those that are well formed."""
    malformed: Interval
    difference: Interval | None
    """Reward of the policy minus this arm's, paired by item; None for the policy itself."""
    kl: float | None
    """Mean KL to the unsteered model, in nats per answer."""
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
    metrics: dict[str, float]
    """The task's own summary over all runs and draws."""


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
        parts: list[Any] = []
        for result in (self.result, *self.companions):
            parts += [_table(result, self.seeds), Text(gain_line(result))]
        compared = self.settings_compared
        if len(compared) > 1:
            parts.append(Text(f"setting chosen on validation among {len(compared)}: {_named(self.setting)}"))
        else:
            parts.append(Text(f"setting: {_named(self.setting)}"))
        parts += [Text(f"missing: {name} ({why})") for name, why in self.missing.items()]
        parts += [Text(f"warning: {warning}") for warning in self.warnings]
        return Group(*parts)


def task_result(task: Task, split: str, played: Sequence[PlayedArm], *, why: str = "", seed: int = 0) -> TaskResult:
    """Summarise all arms on a task's items.

    Args:
        task: the task.
        split: of which the items are.
        played: the arms, among them `unsteered` and `policy`.
        why: why the task stands beside another.
        seed: of the bootstrap.
    """
    by_label = {one.arm.label: one for one in played}
    policy = by_label["policy"]
    arms = tuple(_arm_result(task, one, policy, seed) for one in played)
    return TaskResult(
        task=task.name,
        split=split,
        metric=task.metric,
        items=len(policy.outcomes[0]),
        arms=arms,
        gain=_gain(by_label["unsteered"], policy, seed),
        why=why,
    )


def _arm_result(task: Task, one: PlayedArm, policy: PlayedArm, seed: int) -> ArmResult:
    reward, malformed = _array(one, _reward), _array(one, _malformed)
    correct = None
    if all(o.correct is not None for outcomes in one.outcomes for o in outcomes):
        correct = _array(one, lambda o: float(bool(o.correct)))
    difference = None
    if one is not policy:
        difference = bootstrap_difference(_by_run(policy, one), _by_run(one, policy), seed=seed)
    kls = [mean_kl(run) for run in one.runs]
    logs = [played.edits for run in one.runs for played in run]
    equal, note = _equal_dose(one, policy)
    return ArmResult(
        name=one.arm.name,
        label=one.arm.label,
        match=one.arm.match,
        reward=bootstrap_mean(reward, seed=seed),
        by_seed=tuple(reward.mean(1).tolist()),
        accuracy=None if correct is None else bootstrap_mean(correct, seed=seed),
        accuracy_well_formed=None if correct is None else _well_formed(correct, malformed, seed),
        malformed=bootstrap_mean(malformed, seed=seed),
        difference=difference,
        kl=None if math.isnan(float(np.mean(kls))) else float(np.mean(kls)),
        dose=_pooled([dose_summary(log) for log in logs]) if any(len(log) for log in logs) else None,
        equal_dose=equal,
        dose_note=note,
        kl_matches=tuple(arm.kl.to_json() for arm in one.arms if arm.kl is not None),
        chosen=tuple(arm.chosen for arm in one.arms if arm.chosen),
        metrics=task.summarise([o for outcomes in one.outcomes for o in outcomes]),
    )


def _reward(outcome: Outcome) -> float:
    return float(outcome.reward)


def _malformed(outcome: Outcome) -> float:
    return float(outcome.malformed)


def _array(one: PlayedArm, value: Any) -> NDArray[np.float64]:
    """[S, P]: a number of every outcome, one row per run and draw."""
    return np.array([[value(o) for o in outcomes] for outcomes in one.outcomes], dtype=np.float64)


def _by_run(one: PlayedArm, other: PlayedArm) -> NDArray[np.float64]:
    """[runs, P] mean rewards over draws; one row if either arm was played once for all runs."""
    rows = np.array([np.mean([played.reward for played in run], axis=0) for run in one.runs])
    return rows if len(one.runs) == len(other.runs) else rows.mean(0, keepdims=True)


def _well_formed(correct: NDArray[np.float64], malformed: NDArray[np.float64], seed: int) -> Interval | None:
    formed = 1 - malformed
    if formed.sum() == 0:
        return None
    return bootstrap_ratio_of_sums((correct * formed).sum(0), formed.sum(0), seed=seed)


def _equal_dose(one: PlayedArm, policy: PlayedArm) -> tuple[bool | None, str]:
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


def _gain(unsteered: PlayedArm, policy: PlayedArm, seed: int) -> Gain:
    base_reward, base_malformed = (_array(unsteered, value).mean(0) for value in (_reward, _malformed))
    difference = _array(policy, _reward) - base_reward
    # The unsteered arm is played once; its malformed answers are 0 or 1.
    changed = _array(policy, _malformed) != base_malformed
    return Gain(
        total=bootstrap_mean(difference, seed=seed),
        format=bootstrap_mean(np.where(changed, difference, 0), seed=seed),
        answer=bootstrap_mean(np.where(changed, 0, difference), seed=seed),
    )


def gain_line(result: TaskResult) -> str:
    gain = result.gain
    said = (
        f"The policy's gain over the unsteered model is {_signed(gain.total)}: {_signed(gain.format)} where the answer "
        f"became well formed or malformed, {_signed(gain.answer)} where that did not change."
    )
    if gain.total.low > 0 and not gain.answer.low > 0:
        said += " Without the change of format the gain is not shown."
    return said


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _short(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _table(result: TaskResult, seeds: Sequence[int]) -> Table:
    n = len(seeds)
    title = f"{result.task}, {result.split}: {result.items} items, {n} seed{'s' if n > 1 else ''}"
    table = Table(
        title=title + (f" ({result.why})" if result.why else ""),
        caption="95% intervals, bootstrapped over items with seeds inside. KL in nats per answer. "
        "≠ beside a dose: not within 1% of the policy's.",
    )
    names = ("arm", "reward", "policy − arm", "well-formed accuracy", "malformed", "KL", "‖Δ‖/‖x‖", "edits")
    add_columns(table, names, words=("arm",), whole=("arm",))
    for arm in result.arms:
        dose = "–" if arm.dose is None else f"{arm.dose.relative:.3g}{' ≠' if arm.equal_dose is False else ''}"
        table.add_row(
            arm.label,
            _short(arm.reward),
            "" if arm.difference is None else _signed(arm.difference),
            _short(arm.accuracy_well_formed),
            _short(arm.malformed),
            "–" if arm.kl is None else f"{arm.kl:.3g}",
            dose,
            "0" if arm.dose is None else str(arm.dose.n_edits),
        )
    return table


def _named(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())
