"""The pages of `trimtab train`, of one SAE or of a bank, of `trimtab rank` and of `trimtab evaluate core`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from trimtab.report.page import Figure, figure, number, render, tokens
from trimtab.report.run_files import RunFiles
from trimtab.runs.figures import Curve, plot_bars, plot_curves, plot_ranks
from trimtab.runs.tables import COUNT, NUMBER, SHARE, Column, Table

ENDS = 25
"""Features of each end of a ranking that are listed."""
CURVES = {"explained variance": "explained_variance", "L0": "l0", "loss": "loss", "dead features": "dead_features"}


def train_page(files: RunFiles) -> str:
    """What was trained, what it does on held-out rows, and how the training went."""
    results = files.finished
    members: list[dict[str, Any]] = results.get("members") or [results | {"name": files.path.name}]
    done = [one for one in members if one.get("explained_variance") is not None]
    columns = [
        Column("SAE", "name"),
        Column("Explained variance", "explained_variance", ".4f"),
        Column("L0", "l0", ".2f"),
        Column("L0 asked for", "l0_target", "g"),
        Column("Dead", "dead_share", SHARE),
        Column("On more than 10% of rows", "dense_share", SHARE),
        Column("Steps", "steps", COUNT),
        Column("Rows", "rows", COUNT),
        Column("Seconds", "seconds", ".0f"),
    ]
    best = max(done, key=lambda one: one["explained_variance"], default=None)
    missed = [one["name"] for one in done if one["l0_reached_target"] is False]
    said = "No SAE was trained." if best is None else (
        f"{len(done)} of {len(members)} trained. Explained variance {number(best['explained_variance'], '.4f')} at L0 "
        f"{number(best['l0'], '.2f')}" + (f" for the best, {best['name']}." if len(done) > 1 else ".")
    )  # fmt: skip
    return render(
        "train",
        files=files,
        title="How faithful are the trained SAEs?" if len(members) > 1 else "How faithful is the trained SAE?",
        verdict_text=said + (f" Not at the L0 asked for: {', '.join(missed)}." if missed else ""),
        good=bool(done) and len(done) == len(members) and not missed,
        saes=Table(columns=columns, rows=done, caption="On rows that were not trained on, where some were held out."),
        frontier=_frontier(done),
        curves=[
            figure(plot_curves, title.capitalize(), f"{title.capitalize()} over the training.", height=2.3,
                   curves=[curve._replace(label=title)], axis=title, steps="step")
            for title, name in CURVES.items() if (curve := files.curve(name))
        ],
        failed=[f"{one['name']}: {one['error']}" for one in members if one.get("error")],
    )  # fmt: skip


def _frontier(done: list[dict[str, Any]]) -> Figure | None:
    """Explained variance by L0, a curve for each architecture at each site."""
    by_kind: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for one in done if len(done) > 1 else ():
        by_kind[f"{one['arch']}, {one['site']}"].append((one["l0"], one["explained_variance"]))
    curves = [Curve(kind, *zip(*sorted(points), strict=True)) for kind, points in by_kind.items()]
    caption = "Explained variance by active features per row, on held-out rows."
    if not curves:
        return None
    title, axis = "Explained variance by L0", "explained variance"
    return figure(plot_curves, title, caption, curves=curves, axis=axis, steps="L0")


def rank_page(files: RunFiles) -> str:
    """Both ends of each ranking, and all scores by rank."""
    results = files.finished
    found = files.rows("features.parquet") or []
    by_criterion: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(found, key=lambda row: row["rank"]):
        by_criterion[row["criterion"]].append(row)
    columns = [
        Column("Feature", lambda row: files.feature_link(row["feature"], str(row["feature"]))),
        *[Column("Meaning", "meaning")] * any("meaning" in row for row in found),
        *[Column("Tokens it fires on", lambda row: tokens(row["fires_on"]))] * any("fires_on" in row for row in found),
        Column("Tokens by logit lens", lambda row: tokens(row["top_tokens"])),
        Column("Score", "score", ".4g"),
        Column("Dose", "relative_dose", ".2f", note="‖Δ‖/‖x‖"),
        Column("Fires on", "firing_rate", ".3f", note="% of tokens", factor=100),
        Column("Largest activation", "max_activation", NUMBER),
    ]
    tables = [
        {
            "name": name,
            "figure": figure(
                plot_ranks, f"{name} by rank", f"Scores of {len(rows):,} features.", axis="score",
                curve=Curve(name, [row["rank"] for row in rows], [row["score"] for row in rows]),
            ),
            "top": Table(columns=columns, rows=rows[:ENDS], caption="Largest first."),
            "bottom": Table(columns=columns, rows=rows[:ENDS:-1][:ENDS], caption="Smallest first."),
        }
        for name, rows in by_criterion.items()
    ]  # fmt: skip
    title = f"Which features of {results['sae']} change the next token most?"
    return render("rank", files=files, title=title, results=results, tables=tables)


def core_page(files: RunFiles) -> str:
    """How faithful a dictionary is, and what splicing it in costs the model."""
    results = files.finished
    columns = [Column("Measure", "label"), Column("Value", _metric, "g", note="95%")]
    density = results["density"]
    return render(
        "core",
        files=files,
        title=f"How faithful is {results['sae']}?",
        results=results,
        measures=Table(
            columns=columns,
            rows=results["metrics"],
            caption=f"{results['tokens']:,} tokens of {results['documents']:,} documents.",
        ),
        density=figure(
            plot_bars, "Features by firing rate", f"Features by how often they fire; {density['never']:,} never did.",
            edges=density["log10_edges"], counts=density["counts"], axis="log10 of the firing rate",
        ),
    )  # fmt: skip


def _metric(metric: dict[str, Any]) -> str:
    return number(metric["value"], f".{metric['digits']}f")
