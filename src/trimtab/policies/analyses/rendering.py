"""Analyses as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trimtab.control.columns import add_columns
from trimtab.policies.analyses.branch_points import BranchPoints
from trimtab.policies.analyses.critic import MEAN, CriticReport
from trimtab.policies.analyses.layers import LayerReport
from trimtab.policies.analyses.ledger import Ledger
from trimtab.stats import Interval

ROWS = 20
"""Rows of a table at most; the files hold all."""


def rendered(
    branches: BranchPoints | None,
    critic: CriticReport | None,
    layers: Sequence[LayerReport],
    ledger: Ledger | None,
    warnings: Sequence[str],
    title: str,
) -> Group:
    """What was analysed, as tables and lines."""
    parts: list[Any] = [Text(title)]
    if branches is not None:
        parts += _branches(branches)
    if critic is not None:
        parts += _critic(critic)
    if layers:
        parts += _layers(layers)
    if ledger is not None:
        parts.append(_ledger(ledger))
    parts += [Text(f"warning: {warning}") for warning in warnings]
    return Group(*parts)


def _branches(found: BranchPoints) -> list[Any]:
    lines = [
        f"{len(found.found)} branch points among {len(found.tokens)} tokens of {found.items} items "
        f"(false discovery rate {found.false_discovery_rate:g}); excess flip rate {_signed(found.excess)}"
    ]
    table = Table(title="branch points: tokens where the choice of a feature changes the reward")
    names = ("item", "step", "token", "feature", "reward", "flips", "random", "without", "p", "q", "")
    add_columns(table, names, words=("item", "token"))
    shown = sorted(found.tokens, key=lambda t: (t.q_value, -t.excess))[:ROWS]
    for t in shown:
        table.add_row(
            escape(t.item), str(t.step), escape(repr(t.token)), _feature(t.feature), f"{t.reward:g}",
            f"{t.flips}/{t.tried}", f"{t.random_flips}/{t.tried}", "flips" if t.flips_without else "–",
            f"{t.p_value:.2g}", f"{t.q_value:.2g}",
            "branch point" if t.branch_point else "",
        )  # fmt: skip
    return [table, Text(lines[0])]


def _critic(found: CriticReport) -> list[Any]:
    table = Table(
        title="critic: AUC for the outcome, among items that are alike unsteered",
        caption="probe: ridge regression on the same activations, cross-fitted. 95% intervals over items.",
    )
    add_columns(table, ("items", "step", "n", "end right", "critic", "probe", "probe − critic"), words=("items",))
    for s in found.separations:
        table.add_row(
            s.group, "mean" if s.step == MEAN else str(s.step), str(s.n), str(s.n_right), _short(s.critic),
            _short(s.probe), _signed(s.difference),
        )  # fmt: skip
    counts = ", ".join(f"{count} {group}" for group, count in found.counts.items())
    lines = [Text(f"items: {counts}")]
    lines += [Text(f"{v.group}: {v.label.replace('_', ' ')}: {v.reason}") for v in found.verdicts]
    lines.append(Text(f"wrong items that an action helps: {_short(found.helped.share)} ({found.helped.how})"))
    return [table, *lines]


def _layers(layers: Sequence[LayerReport]) -> list[Any]:
    doses = Table(title="layers: validation reward and divergence by dose", caption="* the dose that was trained with")
    names = ("site", "dose", "reward", "− unsteered", "KL", "malformed")
    add_columns(doses, names, words=("site",), whole=("site",))
    kinds = Table(
        title="layers: shares of activation variance that a factor explains",
        caption="ε² of a one-way analysis of variance; means over features, 95% intervals over features.",
    )
    names = ("site", "factor", "chosen", "by use", "live features", "difference")
    add_columns(kinds, names, words=("site", "factor"), whole=("site",))
    lines = []
    for layer in layers:
        for p in layer.doses:
            star = "*" if p.dose == layer.trained_dose else ""
            doses.add_row(
                layer.site, f"{p.dose:g}{star}", _short(p.reward), _signed(p.difference), _short(p.kl),
                f"{p.malformed:.2f}",
            )  # fmt: skip
        for k in layer.kinds:
            kinds.add_row(
                layer.site, k.factor, _short(k.chosen), f"{k.by_use:.3f}", _short(k.live), _signed(k.difference)
            )
        most = "no dose tried" if layer.tolerated is None else f"doses up to {layer.tolerated:g}"
        note = f"; {layer.note}" if layer.note else ""
        lines.append(Text(f"{layer.site} tolerates {most} ({layer.unit}); {layer.chosen_features} features used{note}"))
    return [doses, kinds, *lines] if any(layer.kinds for layer in layers) else [doses, *lines]


def _ledger(found: Ledger) -> Table:
    table = Table(
        title=f"ledger: {len(found.entries)} features in {found.decisions} decisions of {found.items} items, "
        f"{found.no_edit} without an edit",
        caption="reward: with the feature minus without it, over the items that used it.",
    )
    names = ("feature", "uses", "share", "items", "steps", "local KL", "reward", "tokens")
    add_columns(table, names, words=("tokens",))
    for e in found.entries[:ROWS]:
        table.add_row(
            str(e.feature), str(e.uses), f"{e.share:.3f}", str(e.items), f"{e.first_step}–{e.last_step}",
            _short(e.kl_local), _signed(e.reward_difference), escape(" ".join(repr(t.token) for t in e.tokens[:3])),
        )  # fmt: skip
    return table


def _feature(feature: int) -> str:
    return "none" if feature < 0 else str(feature)


def _short(interval: Interval | None) -> str:
    return "–" if interval is None else _with_bounds(interval, ".3f")


def _signed(interval: Interval | None) -> str:
    return "–" if interval is None else _with_bounds(interval, "+.3f")


def _with_bounds(interval: Interval, form: str) -> str:
    """A single item has no interval."""
    if math.isnan(interval.low):
        return f"{interval.estimate:{form}}"
    return f"{interval.estimate:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
