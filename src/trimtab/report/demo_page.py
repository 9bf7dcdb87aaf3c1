"""The page of `trimtab demo`, from what the run keeps in its directory and nothing else."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from trimtab.errors import UserError
from trimtab.report.page import Figure, figure, render, tokens
from trimtab.report.run_files import RunFiles
from trimtab.runs.figures import ROW, Curve, Mark, plot_intervals, plot_ranks
from trimtab.runs.tables import COUNT, NUMBER, Column, Table
from trimtab.stats import Interval

POINTS = 100.0


def demo_page(files: RunFiles) -> str:
    """The page, from the content of the run's `run.json`.

    Raises:
        UserError: the demo is not finished.
    """
    r, config = files.results, files.config
    if "verdict" not in r:
        raise UserError(f"run {files.path}", "it is not a finished demo", "run `trimtab demo` first")
    names = {arm["name"]: arm["label"] for arm in r["arms"]}
    draws = next(len(arm["draws"]) for arm in r["arms"] if arm["name"] == "random") or 1
    return render(
        "demo",
        title=f"Which features control what {r['model']} writes?",
        lead=f"{r['n_ranked']:,} live features of the SAE at {r['site']} ranked; {r['n_prompts']} held-out prompts; "
        f"{files.lead}",
        r=r,
        names=names | {"random-1": "random feature"},
        lens={f["feature"]: f["top_tokens"][:4] for features in r["features"].values() for f in features},
        scores=_scores(r, draws),
        arms=_arms(r, draws),
        differences=_differences(r),
        curve=_curve(r),
        features=_features(files, names),
        grid=_grid(r, names),
        files=files,
        texts=[
            ("Sampling", f"temperature {config['temperature']:g}, top-p {config['top_p']:g}, seed {config['seed']}"),
            ("Texts per arm", f"{r['n_prompts']} prompts × {config['samples']} samples × {r['n_tokens']} tokens"),
        ],
    )


def _scores(r: dict[str, Any], draws: int) -> Figure:
    steered = [arm for arm in r["arms"] if arm["score"]]
    marks = [
        Mark(
            arm["label"],
            Interval.from_dict(arm["score"]).scaled(POINTS),
            points=[POINTS * draw for draw in arm["draws"]],
            strong=arm["name"] == "delta-confidence",
        )
        for arm in steered
    ]
    caption = (
        f"Scores with 95% intervals, bootstrapped over {r['n_prompts']} prompts. Small dots: {draws} draws of random "
        "features, another one for each text."
    )
    return figure(
        plot_intervals, "Scores of all steered arms with 95% intervals", caption, height=ROW * len(marks) + 0.7,
        marks=marks, axis="tokens at which the steered feature fires, minus unsteered (points of 100)", form="+.1f",
    )  # fmt: skip


def _arms(r: dict[str, Any], draws: int) -> Table:
    return Table(
        columns=[
            Column("Steered with", "label"),
            Column("Score", "score", "+.1f", note="points, 95%", factor=POINTS),
            Column("Score in band", "score_in_band", "+.1f", note="points, 95%", factor=POINTS),
            Column("Texts in band", "in_band", ".0f", note="%, 95%", factor=POINTS),
            Column("NLL", "nll", ".2f", note="nats per token, 95%"),
            Column("4-gram repetition", "repetition", ".1f", note="%, 95%", factor=POINTS),
            Column("‖Δ‖/‖x‖", "relative_dose", ".3f"),
            Column("Edits", "n_edits", COUNT),
        ],
        rows=r["arms"],
        caption=f"All arms. In band: negative log-likelihood under the unedited model between {r['band']['low']:.2f} "
        f"and {r['band']['high']:.2f}, the unsteered texts' 5th and 95th percentile; out of it a text's score counts 0 "
        f"in “score in band”. Edits: tokens edited ({draws} times as many for random features).",
        emphasis=next(arm for arm in r["arms"] if arm["name"] == "delta-confidence"),
    )


def _differences(r: dict[str, Any]) -> Table:
    columns = [
        Column("Difference, pair by prompt", "label"),
        Column("Score", "interval", "+.1f", note="points", factor=POINTS),
        Column("Score in band", "in_band", "+.1f", note="points", factor=POINTS),
    ]
    return Table(columns=columns, rows=r["differences"])


def _curve(r: dict[str, Any]) -> Figure:
    chosen = r["chosen"]["delta-confidence"]
    marked = [(f["rank"], f["score"]) for f in r["features"]["delta-confidence"]]
    caption = (
        "Delta Token Confidence of every live feature at 10 × its largest activation. Left, UP: the model becomes less "
        f"sure of its next token; right, DOWN: surer. Marked: the chosen features ({chosen['direction']}, "
        f"{chosen['size']})."
    )
    return figure(
        plot_ranks, "Delta Token Confidence of every live feature, by rank", caption, axis="ΔC, nats", marked=marked,
        curve=Curve("ΔC", r["ranking"]["rank"], r["ranking"]["score"]),
    )  # fmt: skip


def _features(files: RunFiles, names: dict[str, str]) -> Table:
    r = files.results
    return Table(
        columns=[
            Column("Feature", lambda f: files.feature_link(f["feature"], str(f["feature"]))),
            Column("Tokens by logit lens", lambda f: tokens(f["top_tokens"])),
            Column("Criterion", "criterion"),
            Column("Rank", lambda f: f["rank"] + 1, COUNT, note=f"of {r['n_ranked']:,}"),
            Column("Criterion's score", "score", NUMBER),
            Column("Fires on", "firing_rate", ".2f", note="% of tokens", factor=POINTS),
            Column("Effect", "effect", "+.1f", note="points, held out", factor=POINTS),
        ],
        rows=[f | {"criterion": names[name]} for name, features in r["features"].items() for f in features],
        caption="The features that were steered with, and what the logit lens reads in their direction.",
    )


def _grid(r: dict[str, Any], names: dict[str, str]) -> Table:
    key = ("criterion", "direction", "size", "dose")
    chosen = [[cell[name] for name in key] for cell in r["chosen"].values()]

    def candidates(cell: dict[str, Any]) -> str:
        label = f"{names[cell['criterion']]}, {cell['direction']}"
        is_chosen = [cell[name] for name in key] in chosen
        return Markup("<b>{} ✓</b>").format(label) if is_chosen else label

    return Table(
        columns=[
            Column("Candidates", candidates),
            Column("Set", "size", COUNT),
            Column("Dose", "dose", "g", note="‖Δ‖/‖x‖"),
            Column("Utility", "utility", "+.1f", note="points", factor=POINTS),
            Column("Change of rate", "effect", "+.1f", note="points", factor=POINTS),
            Column("In band", "in_band", ".0f", note="%", factor=POINTS),
            Column("Texts", "n_rows", COUNT),
        ],
        rows=r["grid"],
        caption="Validation prompts.",
    )
