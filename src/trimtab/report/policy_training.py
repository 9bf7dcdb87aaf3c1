"""How a policy learned: its validation reward between the lines of the headroom, and the curves of its training."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.report.curves import Curve, Level, curve_plot
from trimtab.report.page import Column, Html, details, escape, figure, paragraph, table
from trimtab.report.policy_files import PolicyFiles
from trimtab.report.policy_numbers import absent, cell, notes, plain_number

LINES = (
    ("unsteered", "unsteered"),
    ("most_active", "most active"),
    ("static", "best static"),
    ("readout", "readout"),
    ("random_ceiling", "random ceiling"),
    ("ceiling", "ceiling"),
)


class Plot(NamedTuple):
    """One drawing of metrics."""

    title: str
    axis: str
    metrics: tuple[str, ...]


PLOTS = (
    Plot("Reward of training rollouts", "reward", ("charts/episodic_return", "charts/reward")),
    Plot("Effective number of features", "exp(H)", ("policy/effective_features",)),
    Plot("Entropy of the policy", "nats", ("policy/entropy",)),
    Plot("Divergence of updates", "nats", ("losses/approx_kl",)),
    Plot("Divergence from the unsteered model", "nats per answer", ("policy/kl_unsteered",)),
    Plot("Explained variance of the critic", "share", ("losses/explained_variance",)),
    Plot(
        "Share of tokens without an edit, of malformed answers", "share", ("policy/no_edit_share", "charts/malformed")
    ),
    Plot("Features allowed", "features", ("policy/allowed",)),
    Plot("Speed of rollouts", "tokens per second", ("charts/tokens_per_second",)),
)


def series(metrics: Sequence[dict[str, Any]], name: str) -> Curve | None:
    """A metric over its steps; None if it was never logged."""
    pairs = [(float(m["step"]), float(m[name])) for m in metrics if m.get(name) is not None]
    return Curve(name, [s for s, _ in pairs], [v for _, v in pairs]) if pairs else None


def headroom_lines(files: PolicyFiles) -> list[dict[str, Any]]:
    """Lines of the headroom that were measured as the policy was trained: at its site, dose, unit and mask."""
    if files.headroom is None:
        return []
    config = files.record["config"]
    same = [
        line
        for line in files.headroom["lines"]
        if all(line[name] == config.get(name) for name in ("dose", "unit", "mask"))
    ]
    return [line for line in same if config.get("site") in (None, line["site"])]


def headroom_section(files: PolicyFiles) -> list[Html]:
    """The policy between the lines."""
    curve = series(files.metrics, "validation/reward")
    matching = headroom_lines(files)
    content: list[Html] = []
    if curve is not None:
        levels = [Level(label, float(matching[0][name]["estimate"])) for name, label in LINES] if matching else []
        if not levels and files.record["results"]:
            levels = [Level("unsteered", float(files.record["results"]["unsteered_validation_reward"]))]
        caption = "Reward of the greedy policy on validation items. "
        if matching:
            caption += (
                f"Dashed: what {_edit(matching[0])} gains on {matching[0]['items']} items "
                f"({files.headroom['split'] if files.headroom else ''}), with {_tried(matching[0])} tried."
            )
        drawn = curve_plot(
            [curve], "validation reward", "Validation reward between the lines of the headroom", levels=levels
        )
        content.append(figure(drawn, caption))
    if files.headroom is None:
        return [*content, absent("Headroom was not measured.", _headroom_command(files))]
    if not matching:
        content.append(paragraph("The headroom below was not measured at the policy's own site, dose, unit and mask."))
    return [*content, *_headroom_table(files.headroom, matching)]


def _edit(line: dict[str, Any]) -> str:
    every = line.get("scheme") == "every answer token"
    return "one feature held over the whole answer" if every else "one edit at the last prompt token"


def _tried(line: dict[str, Any]) -> str:
    if not line.get("ceiling_is_lower_bound"):
        return "every feature"
    return f"{line['features']:,} of {line['of_features']:,} features (a lower bound on the ceiling over all)"


def _headroom_table(headroom: dict[str, Any], matching: list[dict[str, Any]]) -> list[Html]:
    lines: list[dict[str, Any]] = headroom["lines"]
    columns = [
        Column("Site, mask", numeric=False),
        Column("Dose"),
        *(Column(label.capitalize()) for _, label in LINES),
        Column("Over static"),
    ]
    rows = [
        [
            escape(f"{line['site']}, {line['mask']}"),
            escape(f"{line['dose']:g} {line['unit']}"),
            *(cell(line[name]) for name, _ in LINES),
            plain_number(line.get("over_static"), "+.3f"),
        ]
        for line in lines
    ]
    first = (matching or lines)[:1]
    what = f", with {_edit(first[0])} and {_tried(first[0])} tried" if first else ""
    shown = table(
        columns,
        rows,
        f"Headroom: mean reward of {lines[0]['items'] if lines else 0} items ({headroom['split']}), 95% intervals over "
        f"items{what}. Ceiling: the best allowed feature of each item; random ceiling: the best of as many random "
        "directions of equal norm; best static: one feature for all, cross-fitted; readout: a regression on the "
        "activation picks, cross-fitted.",
        emphasis=lines.index(matching[0]) if matching and len(lines) > 1 else -1,
    )
    warnings = dict.fromkeys(warning for line in lines for warning in line["warnings"])
    return [shown, *notes("Against training here", list(warnings))]


def training_section(files: PolicyFiles) -> list[Html]:
    """Curves of the training."""
    if not files.metrics:
        return [absent("No training is logged here.", f"trimtab policy train --task {files.task or 'TASK'}")]
    drawings: list[Html] = []
    rows: list[list[Html]] = []
    for plot in PLOTS:
        curves = [c for c in (series(files.metrics, name) for name in plot.metrics) if c is not None]
        if not curves:
            continue
        drawings.append(
            figure(curve_plot(curves, plot.axis, plot.title, height=170), f"{plot.title}: {', '.join(plot.metrics)}.")
        )
    names = sorted({name for m in files.metrics for name in m} - {"step"})
    for name in names:
        curve = series(files.metrics, name)
        if curve is not None:
            rows.append(
                [
                    escape(name),
                    *(plain_number(v, ".4g") for v in (curve.values[0], curve.values[-1])),
                    escape(len(curve.steps)),
                ]
            )
    columns = [Column("Metric", numeric=False), Column("First"), Column("Last"), Column("Logged")]
    return [*drawings, details("All metrics, first and last", table(columns, rows, "What metrics.jsonl holds."))]


def _headroom_command(files: PolicyFiles) -> str:
    config = files.record["config"]
    words = ["trimtab", "policy", "headroom"]
    for option, name in (("task", "task"), ("data", "data"), ("model", "model"), ("sae", "sae"), ("dose", "dose"),
                         ("unit", "unit"), ("masks", "mask"), ("max-new-tokens", "max_new_tokens")):  # fmt: skip
        if config.get(name) is not None:
            words += [f"--{option}", str(config[name])]
    if config.get("options_only"):
        words.append("--options-only")
    return shlex.join([*words, "--split", "validation", "--out", str(files.path / "headroom.json")])
