"""Analyses as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from trimtab.policies.analyses.branch_points import BranchPoints
from trimtab.policies.analyses.critic import MEAN, CriticReport
from trimtab.policies.analyses.layers import LayerReport
from trimtab.policies.analyses.ledger import Ledger
from trimtab.runs.tables import COUNT, INTERVAL, SIGNED, Column, result_table
from trimtab.stats import number_text

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
    said = (
        f"{len(found.found)} branch points among {len(found.tokens)} tokens of {found.items} items "
        f"(false discovery rate {found.false_discovery_rate:g}); excess flip rate {number_text(found.excess, SIGNED)}"
    )
    columns = [
        Column("item", "item"),
        Column("step", "step", COUNT),
        Column("token", lambda t: repr(t.token)),
        Column("feature", lambda t: "none" if t.feature < 0 else str(t.feature), "d"),
        Column("reward", "reward", "g"),
        Column("flips", lambda t: f"{t.flips}/{t.tried}", COUNT),
        Column("random", lambda t: f"{t.random_flips}/{t.tried}", COUNT),
        Column("without", lambda t: "flips" if t.flips_without else None, COUNT),
        Column("p", "p_value", ".2g"),
        Column("q", "q_value", ".2g"),
        Column("", lambda t: "branch point" if t.branch_point else "", COUNT),
    ]
    shown = sorted(found.tokens, key=lambda t: (t.q_value, -t.excess))[:ROWS]
    title = "branch points: tokens where the choice of a feature changes the reward"
    return [result_table(columns, shown, title=title), Text(said)]


def _critic(found: CriticReport) -> list[Any]:
    columns = [
        Column("items", "group"),
        Column("step", lambda s: "mean" if s.step == MEAN else str(s.step), COUNT),
        Column("n", "n", COUNT),
        Column("end right", "n_right", COUNT),
        Column("critic", "critic", INTERVAL),
        Column("probe", "probe", INTERVAL),
        Column("probe − critic", "difference", SIGNED),
    ]
    table = result_table(
        columns,
        found.separations,
        title="critic: AUC for the outcome, among items that are alike unsteered",
        caption="probe: ridge regression on the same activations, cross-fitted. 95% intervals over items.",
    )
    helped = number_text(found.helped.share, INTERVAL)
    lines = [
        f"items: {', '.join(f'{count} {group}' for group, count in found.counts.items())}",
        *(f"{v.group}: {v.label.replace('_', ' ')}: {v.reason}" for v in found.verdicts),
        f"wrong items that an action helps: {helped} ({found.helped.how})",
    ]
    return [table, *map(Text, lines)]


def _layers(layers: Sequence[LayerReport]) -> list[Any]:
    columns = [
        Column("site", "site", whole=True),
        Column("dose", lambda row: f"{row['dose']:g}" + "*" * (row["dose"] == row["trained_dose"]), "g"),
        Column("reward", "reward", INTERVAL),
        Column("− unsteered", "difference", SIGNED),
        Column("KL", "kl", INTERVAL),
        Column("malformed", "malformed", ".2f"),
    ]
    doses = result_table(
        columns,
        [vars(layer) | vars(point) for layer in layers for point in layer.doses],
        title="layers: validation reward and divergence by dose",
        caption="* the dose that was trained with",
    )
    columns = [
        Column("site", "site", whole=True),
        Column("factor", "factor"),
        Column("chosen", "chosen", INTERVAL),
        Column("by use", "by_use", INTERVAL),
        Column("live features", "live", INTERVAL),
        Column("difference", "difference", SIGNED),
    ]
    kinds = result_table(
        columns,
        [vars(layer) | vars(kind) for layer in layers for kind in layer.kinds],
        title="layers: shares of activation variance that a factor explains",
        caption="ε² of a one-way analysis of variance; means over features, 95% intervals over features.",
    )
    lines: list[Text] = []
    for layer in layers:
        most = "no dose tried" if layer.tolerated is None else f"doses up to {layer.tolerated:g}"
        note = f"; {layer.note}" if layer.note else ""
        lines.append(Text(f"{layer.site} tolerates {most} ({layer.unit}); {layer.chosen_features} features used{note}"))
    return [doses, *[kinds] * any(layer.kinds for layer in layers), *lines]


def _ledger(found: Ledger) -> Table:
    columns = [
        Column("feature", "feature", "d"),
        Column("uses", "uses", COUNT),
        Column("share", "share", ".3f"),
        Column("items", "items", COUNT),
        Column("steps", lambda e: f"{e.first_step}–{e.last_step}", COUNT),
        Column("local KL", "kl_local", INTERVAL),
        Column("reward", "reward_difference", SIGNED),
        Column("tokens", lambda e: " ".join(repr(t.token) for t in e.tokens[:3])),
    ]
    return result_table(
        columns,
        found.entries[:ROWS],
        title=f"ledger: {len(found.entries)} features in {found.decisions} decisions of {found.items} items, "
        f"{found.no_edit} without an edit",
        caption="reward: with the feature minus without it, over the items that used it.",
    )
