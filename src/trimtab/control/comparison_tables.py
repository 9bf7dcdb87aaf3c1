"""A comparison as tables: every arm beside the reference, and the task's own metrics."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.control.task_result import TaskResult
from trimtab.runs.tables import COUNT, INTERVAL, NUMBER, SIGNED, Column, Table


def gain_line(result: TaskResult) -> str:
    """The reference's gain over the unsteered model, in a sentence or two."""
    gain = result.gain
    said = (
        f"The {result.reference}'s gain over the unsteered model is {gain.total:{SIGNED}}: {gain.format:{SIGNED}} "
        f"where the answer became well formed or malformed, {gain.answer:{SIGNED}} where that did not change."
    )
    if gain.total.low > 0 and not gain.answer.low > 0:
        said += " Without the change of format the gain is not shown."
    if gain.over_runs is not None:
        said += f" Over trainings, too, its interval is {gain.over_runs.bounds(SIGNED)}."
    return said


def arms_table(result: TaskResult, seeds: Sequence[int]) -> Table:
    """One row an arm, with the reference's paired difference to it."""
    n = len(seeds)
    columns = [
        Column("arm", "label", whole=True),
        Column("reward", "reward", INTERVAL),
        Column(f"{result.reference} − arm", "difference", SIGNED),
        *[Column("over trainings", lambda arm: (i := arm.difference_over_runs) and i.bounds(SIGNED), SIGNED)] * (n > 1),
        Column("well formed accuracy", "accuracy_well_formed", INTERVAL, spare=3),
        Column("malformed", "malformed", INTERVAL, spare=4),
        Column("KL", "kl", NUMBER, spare=1, equal="equal_kl"),
        Column("‖Δ‖/‖x‖", "dose.relative", NUMBER, spare=2, equal="equal_dose"),
        Column("edits", lambda arm: 0 if arm.dose is None else arm.dose.n_edits, COUNT, spare=5),
    ]
    title = f"{result.task}, {result.split}: {result.items} items, {n} seed{'s' if n > 1 else ''}"
    return Table(
        columns=columns,
        rows=result.arms,
        title=title + (f" ({result.why})" if result.why else ""),
        caption="95% intervals, bootstrapped over items with seeds inside; over trainings: of other runs, too. KL in "
        "nats per answer. ≠ beside a dose: "
        f"not within 1% of the {result.reference}'s; beside a KL that was made equal on validation: not within 10% of "
        "it here.",
    )


def metrics_table(result: TaskResult) -> Table | None:
    """The task's own metrics of the main arms; None if there are none."""
    arms = [arm for arm in result.arms if arm.metric_intervals or arm.known]
    if not arms:
        return None
    names = dict.fromkeys(name for arm in arms for name in arm.metric_intervals)
    columns = [Column("arm", "label", whole=True)]
    columns += [
        Column(name, lambda arm, name=name: arm.metric_intervals.get(name), INTERVAL, spare=i)
        for i, name in enumerate(names)
    ]
    known = any(arm.known for arm in arms)
    if known:
        columns += [
            Column("known", "known", INTERVAL),
            Column(f"{result.reference} − arm", "known_difference", SIGNED),
        ]
    return Table(
        columns=columns,
        rows=arms,
        title=f"{result.task}, {result.split}: the task's own metrics",
        caption="95% intervals over items." + " known: right under every cyclic order of the options." * known,
    )
