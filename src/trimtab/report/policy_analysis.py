"""Where a policy's choices mattered, what its critic knows, which features it used: what `policy analyze` found."""

from __future__ import annotations

from typing import Any

from trimtab.report.page import Figure, figure, tokens, visible
from trimtab.report.run_files import RunFiles
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.tables import COUNT, INTERVAL, NUMBER, SIGNED, Column, Table

ROWS = 40
"""Rows of a table at most; the files hold all."""
SHOWN_FORKS = 20
"""Branch points whose forks are listed."""
MEAN = -1
"""The step that stands for the mean over an item's decisions."""
HIDDEN = "hidden"


def analysis(files: RunFiles) -> dict[str, Any]:
    """The parts of the analysis; None for those that were not made."""
    found = files.analysis
    if found is None:
        return dict.fromkeys(("branch_points", "critic", "layers", "ledger"))
    return {
        "source": f"{found['split']}, {found['items']:,} items, {'greedy' if found['greedy'] else 'sampled'} actions",
        "branch_points": found["branch_points"] and _branch_points(files, found["branch_points"]),
        "critic": found["critic"] and _critic(found["critic"]),
        "layers": found["layers"] and _layers(found["layers"]),
        "ledger": found["ledger"] and _ledger(files, found["ledger"]),
    }


def _branch_points(files: RunFiles, found: dict[str, Any]) -> dict[str, Any]:
    """Tokens at which the choice of a feature changes the reward."""
    every = sorted(found["tokens"], key=lambda t: (t["q_value"], -t["excess"]))
    points = [token for token in every if token["branch_point"]]
    order = {item: i for i, item in enumerate(dict.fromkeys(token["item"] for token in found["tokens"]))}

    def name(token: dict[str, Any]) -> str:
        return f"#{order[token['item']]}" if files.hides_text else str(token["item"])

    columns = [
        Column("Item", name),
        Column("Position", "position", COUNT),
        Column("Token", lambda t: HIDDEN if files.hides_text else visible(t["token"])),
        Column("Feature", lambda t: files.feature_link(t["feature"])),
        Column("Reward", "reward", NUMBER),
        Column("Flips", lambda t: f"{t['flips']}/{t['tried']}", COUNT, note="policy's candidates"),
        Column("Flips", lambda t: f"{t['random_flips']}/{t['tried']}", COUNT, note="random, equal KL"),
        Column("Excess", "excess", "+.2f"),
        Column("Without edit", lambda t: "flips" if t["flips_without"] else "–"),
        Column("p", "p_value", ".2g"),
        Column("q", "q_value", ".2g"),
        Column("", lambda t: "branch point" if t["branch_point"] else ""),
    ]
    caption = "The tokens with the smallest q. p: Fisher's exact test; q: corrected for all tokens tried."
    forks = files.rows("analysis/branch_forks.parquet") or []
    return {
        **found,
        "points": len(points),
        "table": Table(columns=columns, rows=every[:ROWS], caption=caption),
        "forks": [
            (f"{name(token)}, position {token['position']}", _forks(files, forks, token))
            for token in points[:SHOWN_FORKS]
        ],
    }


def _forks(files: RunFiles, forks: list[dict[str, Any]], token: dict[str, Any]) -> Table:
    columns = [
        Column("In its place", "kind"),
        Column("Feature", lambda fork: files.feature_link(fork["feature"])),
        Column("Dose", "dose", NUMBER),
        Column("Local KL", "kl_local", NUMBER, note="nats"),
        Column("Reward", "reward", NUMBER),
        Column("", lambda fork: "flips" if fork["flip"] else ""),
    ]
    return Table(
        columns=columns,
        rows=[fork for fork in forks if (fork["item"], fork["step"]) == (token["item"], token["step"])],
    )


def _critic(found: dict[str, Any]) -> dict[str, Any]:
    """The critic's curves, AUCs and verdicts."""
    columns = [
        Column("Items", "group"),
        Column("Step", lambda s: "mean" if s["step"] == MEAN else str(s["step"]), COUNT),
        Column("n", "n", COUNT),
        Column("End right", "n_right", COUNT),
        Column("Critic", "critic", INTERVAL, note="AUC, 95%"),
        Column("Probe", "probe", INTERVAL, note="AUC, 95%"),
        Column("Probe − critic", "difference", SIGNED, note="95%"),
    ]
    caption = (
        "How well the critic tells answers that end right, among items that are alike unsteered; beside it a probe on "
        "the same activations, cross-fitted."
    )
    return {
        **found,
        "counts": ", ".join(f"{n:,} {group}" for group, n in found["counts"].items()),
        "figure": _values(found),
        "table": Table(columns=columns, rows=found["separations"], caption=caption),
    }


def _values(found: dict[str, Any]) -> Figure | None:
    curves: list[Curve] = []
    for group in found["counts"]:
        points = [point for point in found["curve"] if point["group"] == group]
        if points:
            curves.append(Curve(group, [p["step"] for p in points], [p["mean"] for p in points]))
    caption = (
        "Mean value of the critic. Correct: right with and without the policy; corrected: right with it only; "
        "misguided: right without it only; incorrect: wrong with and without."
    )
    title = "Mean value of the critic by step and outcome"
    steps = "step of the answer"
    return figure(plot_curves, title, caption, curves=curves, axis="value", steps=steps) if curves else None


def _layers(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Doses that each site tolerates, and the kinds of features that its policy chose."""
    doses = [
        Column("Site", "site"),
        Column("Dose", _dose, NUMBER),
        Column("Reward", "reward", INTERVAL, note="95%"),
        Column("− unsteered", "difference", SIGNED, note="paired, 95%"),
        Column("KL", "kl", INTERVAL, note="nats per answer, 95%"),
        Column("Malformed", "malformed", ".3f"),
    ]
    kinds = [
        Column("Site", "site"),
        Column("Factor", "factor"),
        Column("Chosen features", "chosen", INTERVAL, note="95%"),
        Column("By use", "by_use", INTERVAL),
        Column("Live features", "live", INTERVAL, note="95%"),
        Column("Chosen − live", "difference", SIGNED, note="95%"),
    ]
    shares = "Share of a feature's activation variance that a factor explains (ε²), over features."
    return {
        "doses": Table(
            columns=doses,
            rows=[layer | point for layer in layers for point in layer["doses"]],
            caption="The policy at several doses, on validation items.",
        ),
        "kinds": Table(
            columns=kinds, rows=[layer | kind for layer in layers for kind in layer["kinds"]], caption=shares
        ),
        "layers": layers,
    }


def _dose(point: dict[str, Any]) -> str:
    return f"{point['dose']:g} {point['unit']}" + " (trained)" * (point["dose"] == point["trained_dose"])


def _ledger(files: RunFiles, found: dict[str, Any]) -> dict[str, Any]:
    """Every feature used: how often, where, with what effect."""
    columns = [
        Column("Feature", lambda e: files.feature_link(e["feature"])),
        Column("Uses", "uses", COUNT),
        Column("Share", "share", ".3f", note="of decisions"),
        Column("Items", "items", COUNT),
        Column(
            "Steps", lambda e: f"{e['first_step']}, {e['median_step']:g}, {e['last_step']}", COUNT,
            note="first, median, last",
        ),
        Column("Local KL", "kl_local", INTERVAL, note="nats, 95%"),
        Column("Reward with − without", "reward_difference", SIGNED, note="95%"),
    ]  # fmt: skip
    if not files.hides_text:
        columns.append(Column("At tokens", lambda e: tokens([f"{t['token']} {t['count']}" for t in e["tokens"]])))
    return {
        **found,
        "table": Table(columns=columns, rows=found["entries"][:ROWS], caption="The most used features."),
        "contexts": [] if files.hides_text else [e for e in found["entries"][:ROWS] if e["contexts"]],
    }
