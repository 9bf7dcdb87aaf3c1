"""A comparison as tables: every arm beside the reference, and the task's own metrics."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from trimtab.control.columns import add_columns
from trimtab.control.results import TaskResult
from trimtab.stats import Interval


def gain_line(result: TaskResult) -> str:
    gain = result.gain
    said = (
        f"The {result.reference}'s gain over the unsteered model is {_signed(gain.total)}: {_signed(gain.format)} "
        f"where the answer became well formed or malformed, {_signed(gain.answer)} where that did not change."
    )
    if gain.total.low > 0 and not gain.answer.low > 0:
        said += " Without the change of format the gain is not shown."
    if gain.over_runs is not None:
        said += f" Over trainings, too, its interval is [{gain.over_runs.low:+.3f}, {gain.over_runs.high:+.3f}]."
    return said


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _bounds(interval: Interval | None) -> str:
    return "" if interval is None else f"[{interval.low:+.3f}, {interval.high:+.3f}]"


def _short(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def arms_table(result: TaskResult, seeds: Sequence[int]) -> Table:
    n = len(seeds)
    title = f"{result.task}, {result.split}: {result.items} items, {n} seed{'s' if n > 1 else ''}"
    table = Table(
        title=title + (f" ({result.why})" if result.why else ""),
        caption="95% intervals, bootstrapped over items with seeds inside; over trainings: of other runs, too. KL in "
        "nats per answer. ≠ beside a dose: "
        f"not within 1% of the {result.reference}'s; beside a KL that was made equal on validation: not within 10% of "
        "it here.",
    )
    over = ("over trainings",) if n > 1 else ()
    names = ("arm", "reward", f"{result.reference} − arm", *over, "well formed accuracy", "malformed", "KL",
             "‖Δ‖/‖x‖", "edits")  # fmt: skip
    add_columns(table, names, words=("arm",), whole=("arm",))
    for arm in result.arms:
        dose = "–" if arm.dose is None else f"{arm.dose.relative:.3g}{' ≠' if arm.equal_dose is False else ''}"
        table.add_row(
            arm.label,
            _short(arm.reward),
            "" if arm.difference is None else _signed(arm.difference),
            *((_bounds(arm.difference_over_runs),) if n > 1 else ()),
            _short(arm.accuracy_well_formed),
            _short(arm.malformed),
            "–" if arm.kl is None else f"{arm.kl:.3g}{' ≠' if arm.equal_kl is False else ''}",
            dose,
            "0" if arm.dose is None else str(arm.dose.n_edits),
        )
    return table


def metrics_table(result: TaskResult) -> Table | None:
    """The task's own metrics of the main arms; None if there are none."""
    arms = [arm for arm in result.arms if arm.metric_intervals or arm.known]
    if not arms:
        return None
    names = list(dict.fromkeys(name for arm in arms for name in arm.metric_intervals))
    known = ("known", f"{result.reference} − arm") if any(arm.known for arm in arms) else ()
    table = Table(
        title=f"{result.task}, {result.split}: the task's own metrics",
        caption="95% intervals over items." + " known: right under every cyclic order of the options." * bool(known),
    )
    add_columns(table, ("arm", *names, *known), words=("arm",), whole=("arm",))
    for arm in arms:
        difference = "" if arm.known_difference is None else _signed(arm.known_difference)
        cells = [_short(arm.known), difference] if known else []
        table.add_row(arm.label, *(_short(arm.metric_intervals.get(name)) for name in names), *cells)
    return table
