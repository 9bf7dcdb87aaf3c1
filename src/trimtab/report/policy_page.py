"""The page of a policy: how it was trained, what it gains over its controls, and where its choices mattered.

Made from a run directory and nothing else; what is not there yet is a line that names the command which makes it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from trimtab.report.page import Figure, figure, number, render
from trimtab.report.policy_analysis import analysis
from trimtab.report.policy_arms import answer, arms
from trimtab.report.policy_tokens import strips
from trimtab.report.run_files import RunFiles
from trimtab.runs.figures import Level, plot_curves
from trimtab.runs.tables import COUNT, INTERVAL, Column, Table

LINES = {
    "unsteered": "unsteered",
    "most_active": "most active",
    "static": "best static",
    "readout": "readout",
    "random_ceiling": "random ceiling",
    "ceiling": "ceiling",
}


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


def policy_page(files: RunFiles) -> str:
    """The page, from what a run directory holds."""
    config, results = files.config, files.results
    setting = ""
    if "model" in config:
        setting = f"{config['model']}, dose {config['dose']:g} {config['unit']}, mask {config['mask']}; "
    text, good = answer(files)
    found = files.evaluation
    tasks = [found["result"], *found["companions"]] if found else []
    return render(
        "policy",
        title=f"What does a policy gain on {files.task or 'its task'}?",
        lead=f"{setting}{files.lead}",
        verdict_text=text,
        good=good,
        files=files,
        headroom=headroom(files),
        evaluation=found and {**found, "tasks": [arms(files, found, task) for task in tasks]},
        strips=strips(files),
        analysis=analysis(files),
        curves=list(curves(files)),
        metrics=metrics(files),
        training=training(files),
        warnings=results.get("warnings", []),
        commands=commands(files),
    )  # fmt: skip


def commands(files: RunFiles) -> dict[str, str]:
    """The commands that make what may be absent."""
    config = files.config
    words = ["trimtab", "policy", "headroom"]
    for name in ("task", "data", "model", "sae", "dose", "unit", "mask", "max_new_tokens"):
        if config.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(config[name])]
    words += ["--options-only"] * bool(config.get("options_only"))
    return {
        "headroom": shlex.join([*words, "--split", "validation", "--run", str(files.path)]),
        "evaluate": f"trimtab policy evaluate {files.path}",
        "analyze": f"trimtab policy analyze {files.path} --part",
        "train": f"trimtab policy train --task {files.task or 'TASK'}",
    }


def headroom(files: RunFiles) -> dict[str, Any]:
    """The policy's validation reward between the lines of its own headroom, and the table of all that was measured."""
    found, config = files.headroom, files.config
    lines: list[dict[str, Any]] = found["lines"] if found else []
    matching = [
        line
        for line in lines
        if all(line[name] == config.get(name) for name in ("dose", "unit", "mask"))
        and config.get("site") in (None, line["site"])
    ]
    return {
        "measured": found is not None,
        "matching": bool(matching),
        "figure": _between(files, matching),
        "table": _headroom_table(found, lines, matching) if found else None,
        "warnings": list(dict.fromkeys(warning for line in lines for warning in line["warnings"])),
    }


def _between(files: RunFiles, matching: Sequence[dict[str, Any]]) -> Figure | None:
    curve = files.curve("validation/reward")
    if curve is None:
        return None
    caption = "Reward of the greedy policy on validation items."
    levels: list[Level] = []
    if matching and files.headroom:
        line = matching[0]
        levels = [Level(label, float(line[name]["estimate"])) for name, label in LINES.items()]
        caption += (
            f" Dashed: what {_edit(line)} gains on {line['items']} items ({files.headroom['split']}), with "
            f"{_tried(line)} tried."
        )
    elif files.results:
        levels = [Level("unsteered", float(files.results["unsteered_validation_reward"]))]
    title = "Validation reward between the lines of the headroom"
    return figure(
        plot_curves, title, caption, height=3.4, curves=[curve._replace(label="policy")], axis="validation reward",
        levels=levels,
    )  # fmt: skip


def _headroom_table(
    found: dict[str, Any], lines: Sequence[dict[str, Any]], matching: Sequence[dict[str, Any]]
) -> Table | None:
    if not lines:
        return None
    first = (*matching, *lines)[0]
    return Table(
        columns=[
            Column("Site, mask", lambda line: f"{line['site']}, {line['mask']}"),
            Column("Dose", lambda line: f"{line['dose']:g} {line['unit']}", "g"),
            *(Column(label.capitalize(), name, INTERVAL) for name, label in LINES.items()),
            Column("Over static", "over_static", "+.3f"),
        ],
        rows=lines,
        caption=f"Headroom: mean reward of {lines[0]['items']} items ({found['split']}), 95% intervals over items, "
        f"with {_edit(first)} and {_tried(first)} tried. Ceiling: the best allowed feature of each item; random "
        "ceiling: the best of as many random directions of equal norm; best static: one feature for all, cross-fitted; "
        "readout: a regression on the activation picks, cross-fitted.",
        emphasis=matching[0] if matching and len(lines) > 1 else None,
    )


def _edit(line: dict[str, Any]) -> str:
    every = line["scheme"] == "every answer token"
    return "one feature held over the whole answer" if every else "one edit at the last prompt token"


def _tried(line: dict[str, Any]) -> str:
    if not line["ceiling_is_lower_bound"]:
        return "every feature"
    return f"{line['features']:,} of {line['of_features']:,} features (a lower bound on the ceiling over all)"


def curves(files: RunFiles) -> Iterator[Figure]:
    """Curves of the training."""
    for plot in PLOTS:
        found = [curve for curve in map(files.curve, plot.metrics) if curve is not None]
        if found:
            caption = f"{plot.title}: {', '.join(plot.metrics)}."
            yield figure(plot_curves, plot.title, caption, height=2.3, curves=found, axis=plot.axis)


def metrics(files: RunFiles) -> Table:
    """Every metric at both ends of the training."""
    names = sorted({name for line in files.metrics for name in line} - {"step"})
    return Table(
        columns=[
            Column("Metric", "label"),
            Column("First", lambda curve: curve.values[0], ".4g"),
            Column("Last", lambda curve: curve.values[-1], ".4g"),
            Column("Logged", lambda curve: len(curve.steps), COUNT),
        ],
        rows=[curve for curve in map(files.curve, names) if curve is not None],
        caption="What metrics.jsonl holds.",
    )


def training(files: RunFiles) -> str:
    """How much was trained, and which policy was kept."""
    results = files.results
    if "rollouts" not in results:
        return ""
    return (
        f"{number(results['rollouts'], COUNT)} rollouts in {results['iterations']} iterations. Kept: the policy of "
        f"iteration {results['best_iteration']}, chosen on validation."
    )
