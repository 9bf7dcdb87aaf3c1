"""What analyses found of a policy, as plain values and as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.text import Text

from trimtab.policies.analyses.branch_points import BranchPoints
from trimtab.policies.analyses.critic import MEAN, CriticReport
from trimtab.policies.analyses.layers import LayerReport
from trimtab.policies.analyses.ledger import Ledger
from trimtab.runs import json_safe
from trimtab.runs.tables import COUNT, INTERVAL, SIGNED, Column, Table
from trimtab.stats import number_text

ROWS = 20
"""Rows of a table at most; the files hold all."""


@dataclass(frozen=True, kw_only=True)
class PolicyAnalysis:
    """What the analyses found; None for those that were not asked for."""

    run: str
    task: str
    split: str
    items: int
    site: str
    greedy: bool
    checkpoint: str
    """Name of the checkpoint that the policy is from."""
    branch_points: BranchPoints | None
    critic: CriticReport | None
    layers: tuple[LayerReport, ...]
    ledger: Ledger | None
    warnings: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, intervals as dicts, without what only tables hold: forks, and shares of each feature."""
        plain = json_safe(self)
        if plain["branch_points"]:
            del plain["branch_points"]["forks"]
        for layer in plain["layers"]:
            del layer["shares"]
        return plain

    def render(self) -> Group:
        """A table for each analysis, and what must be said beside it."""
        parts: list[Table | str] = [f"{self.task}, {self.split}: {self.items} items at {self.site}"]
        if self.branch_points is not None:
            parts += _branches(self.branch_points)
        if self.critic is not None:
            parts += _critic(self.critic)
        if self.layers:
            parts += _layers(self.layers)
        if self.ledger is not None:
            parts.append(_ledger(self.ledger))
        parts += [f"warning: {warning}" for warning in self.warnings]
        return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def _branches(found: BranchPoints) -> list[Table | str]:
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
    return [Table(columns=columns, rows=shown, title=title), said]


def _critic(found: CriticReport) -> list[Table | str]:
    columns = [
        Column("items", "group"),
        Column("step", lambda s: "mean" if s.step == MEAN else str(s.step), COUNT),
        Column("n", "n", COUNT),
        Column("end right", "n_right", COUNT),
        Column("critic", "critic", INTERVAL),
        Column("probe", "probe", INTERVAL),
        Column("probe − critic", "difference", SIGNED),
    ]
    table = Table(
        columns=columns,
        rows=found.separations,
        title="critic: AUC for the outcome, among items that are alike unsteered",
        caption="probe: ridge regression on the same activations, cross-fitted. 95% intervals over items.",
    )
    helped = number_text(found.helped.share, INTERVAL)
    return [
        table,
        f"items: {', '.join(f'{count} {group}' for group, count in found.counts.items())}",
        *(f"{v.group}: {v.label.replace('_', ' ')}: {v.reason}" for v in found.verdicts),
        f"wrong items that an action helps: {helped} ({found.helped.how})",
    ]


def _layers(layers: Sequence[LayerReport]) -> list[Table | str]:
    columns = [
        Column("site", "site", whole=True),
        Column("dose", lambda row: f"{row['dose']:g}" + "*" * (row["dose"] == row["trained_dose"]), "g"),
        Column("reward", "reward", INTERVAL),
        Column("− unsteered", "difference", SIGNED),
        Column("KL", "kl", INTERVAL),
        Column("malformed", "malformed", ".2f"),
    ]
    doses = Table(
        columns=columns,
        rows=[vars(layer) | vars(point) for layer in layers for point in layer.doses],
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
    kinds = Table(
        columns=columns,
        rows=[vars(layer) | vars(kind) for layer in layers for kind in layer.kinds],
        title="layers: shares of activation variance that a factor explains",
        caption="ε² of a one-way analysis of variance; means over features, 95% intervals over features.",
    )
    lines: list[str] = []
    for layer in layers:
        most = "no dose tried" if layer.tolerated is None else f"doses up to {layer.tolerated:g}"
        note = f"; {layer.note}" if layer.note else ""
        lines.append(f"{layer.site} tolerates {most} ({layer.unit}); {layer.chosen_features} features used{note}")
    return [doses, *[kinds] * any(layer.kinds for layer in layers), *lines]


def _ledger(found: Ledger) -> Table:
    columns = [
        Column("feature", "feature", "d"),
        Column("words", "words", spare=1),
        Column("uses", "uses", COUNT),
        Column("share", "share", ".3f"),
        Column("items", "items", COUNT),
        Column("steps", lambda e: f"{e.first_step}–{e.last_step}", COUNT),
        Column("local KL", "kl_local", INTERVAL),
        Column("reward", "reward_difference", SIGNED),
        Column("tokens", lambda e: " ".join(repr(t.token) for t in e.tokens[:3])),
    ]
    return Table(
        columns=columns,
        rows=found.entries[:ROWS],
        title=f"ledger: {len(found.entries)} features in {found.decisions} decisions of {found.items} items, "
        f"{found.no_edit} without an edit",
        caption="reward: with the feature minus without it, over the items that used it.",
    )
