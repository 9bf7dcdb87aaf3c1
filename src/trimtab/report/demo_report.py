"""The report of `trimtab demo`, from what the run keeps in its directory and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.report.drawing import Mark, interval_plot, rank_curve
from trimtab.report.page import (
    Column,
    Html,
    Page,
    callout,
    details,
    escape,
    facts,
    figure,
    join,
    number,
    paragraph,
    table,
    tag,
)
from trimtab.runs import read_record, write_text
from trimtab.stats import Interval, interval_of

REPORT_NAME = "report.html"
NAMES = {
    "unsteered": "not steered",
    "delta-confidence": "delta-confidence",
    "output-score": "output score",
    "chosen-random": "random, chosen likewise",
    "random": "random features",
    "random-1": "random feature",
    "most-active": "most active feature",
}
POINTS = 100.0


def write_demo_report(run: Path) -> Path:
    """Write `report.html` into the directory of a finished demo.

    Returns:
        The file.

    Raises:
        UserError: there is no finished demo there, or the disk refuses.
    """
    record = read_record(run)
    results = record["results"]
    if record["command"] != "demo" or not isinstance(results, dict) or "verdict" not in results:
        raise UserError(f"run {run}", "it is not a finished demo", "run `trimtab demo` first")
    path = run / REPORT_NAME
    write_text(path, demo_page(record).render())
    return path


def demo_page(record: dict[str, Any]) -> Page:
    """The page, from the content of the run's `run.json`."""
    r: dict[str, Any] = record["results"]
    page = Page(
        f"Which features control what {r['model']} writes?",
        f"{r['n_ranked']:,} live features of the SAE at {r['site']} ranked; {r['n_prompts']} held-out prompts; "
        f"trimtab {record['versions'].get('trimtab', '')}, {str(record['updated'])[:10]}",
    )
    page.add(callout(r["verdict"]["text"], good=bool(r["verdict"]["yes"])))
    page.section("On held-out prompts", *_held_out(r))
    page.section("What it wrote", *_texts(r))
    page.section("The features", *_features(r))
    page.section("How they were chosen", *_choice(r))
    page.section("How it was measured", *_method(record))
    return page


def _held_out(r: dict[str, Any]) -> list[Html]:
    arms: list[dict[str, Any]] = r["arms"]
    steered = [arm for arm in arms if arm["score"]]
    marks = [
        Mark(
            NAMES[arm["name"]],
            Interval.from_dict(arm["score"]),
            tuple(arm["draws"]),
            strong=arm["name"] == "delta-confidence",
        )
        for arm in steered
    ]
    axis = "tokens at which the steered feature fires, minus unsteered (points of 100)"
    columns = [
        Column("Steered with", numeric=False),
        Column("Score", "points, 95%"),
        Column("Score in band", "points, 95%"),
        Column("Texts in band", "%, 95%"),
        Column("NLL", "nats per token, 95%"),
        Column("4-gram repetition", "%, 95%"),
        Column("‖Δ‖/‖x‖"),
        Column("Edits"),
    ]
    rows = [
        [
            escape(NAMES[arm["name"]]),
            number(interval_of(arm["score"]), 1, POINTS, signed=True),
            number(interval_of(arm["score_in_band"]), 1, POINTS, signed=True),
            number(interval_of(arm["in_band"]), 0, POINTS),
            number(interval_of(arm["nll"]), 2),
            number(interval_of(arm["repetition"]), 1, POINTS),
            escape(f"{arm['relative_dose']:.3f}"),
            escape(f"{arm['n_edits']:,}"),
        ]
        for arm in arms
    ]
    treated = next(i for i, arm in enumerate(arms) if arm["name"] == "delta-confidence")
    differences = table(
        [
            Column("Difference, pair by prompt", numeric=False),
            Column("Score", "points"),
            Column("Score in band", "points"),
        ],
        [
            [
                escape(f"delta-confidence − {NAMES[d['arm']]}"),
                number(interval_of(d["interval"]), 1, POINTS, signed=True),
                number(interval_of(d["in_band"]), 1, POINTS, signed=True),
            ]
            for d in r["differences"]
        ],
    )
    random = next(arm for arm in arms if arm["name"] == "random")
    draws = len(random["draws"]) or 1
    return [
        paragraph(
            "The unedited model reads each continuation again. The score is the rate of tokens at which the feature "
            "that the text was steered with fires there, minus its rate in the unsteered continuation of the same "
            "prompt."
        ),
        figure(
            interval_plot(marks, axis, "Scores of all steered arms with 95% intervals", factor=POINTS),
            f"Scores with 95% intervals, bootstrapped over {r['n_prompts']} prompts. Small dots: {draws} draws of "
            "random features, another one for each text.",
        ),
        table(
            columns,
            rows,
            f"All arms. In band: negative log-likelihood under the unedited model between {r['band']['low']:.2f} and "
            f"{r['band']['high']:.2f}, the unsteered texts' 5th and 95th percentile; out of it a text's score counts 0 "
            f"in “score in band”. Edits: tokens edited ({draws} times as many for random features).",
            emphasis=treated,
        ),
        differences,
    ]


def _texts(r: dict[str, Any]) -> list[Html]:
    lens = {f["feature"]: f["top_tokens"] for features in r["features"].values() for f in features}
    blocks: list[Html] = []
    for example in r["examples"]["rows"]:
        entries = [
            Html(
                tag("dt", escape("not steered"))
                + tag("dd", _strip(example["unsteered"]["tokens"], None), class_="tokens")
            )
        ]
        for name in ("delta-confidence", "output-score", "random-1"):
            text = example[name]
            about = f"feature {text['feature']}"
            tokens = [_visible(t) for t in lens.get(text["feature"], [])[:4]]
            note = tag("small", escape(about + (f": {' '.join(tokens)}" if tokens else "")))
            entries.append(
                Html(
                    tag("dt", escape(NAMES[name]), note)
                    + tag("dd", _strip(text["tokens"], text["fired"]), class_="tokens")
                )
            )
        prompt = tag("p", tag("b", escape(f"{example['prompt']} …")))
        blocks.append(tag("div", prompt, tag("dl", *entries), class_="texts"))
    return [
        paragraph(
            f"Not picked: {r['examples']['rule']}. Marked tokens are those at which the unedited model, reading the "
            "text again, finds the steered feature."
        ),
        *blocks,
    ]


def _features(r: dict[str, Any]) -> list[Html]:
    columns = [
        Column("Feature", numeric=False),
        Column("Criterion", numeric=False),
        Column("Rank", f"of {r['n_ranked']:,}"),
        Column("Criterion's score"),
        Column("Fires on", "% of tokens"),
        Column("Effect", "points, held out"),
        Column("Tokens by logit lens", numeric=False),
    ]
    rows: list[list[Html]] = []
    for name, features in r["features"].items():
        for f in features:
            effect = f["effect"]
            rows.append(
                [
                    escape(f["feature"]),
                    escape(NAMES[name]),
                    escape(f"{f['rank'] + 1:,}"),
                    escape(f"{f['score']:.3g}".replace("-", "−")),
                    escape(f"{POINTS * f['firing_rate']:.2f}"),
                    escape("–" if effect is None else f"{POINTS * effect:+.1f}".replace("-", "−")),
                    tag("span", *(tag("span", escape(_visible(t))) for t in f["top_tokens"]), class_="lens"),
                ]
            )
    ranking = r["ranking"]
    marked = [
        (f["rank"], f["score"], f"feature {f['feature']}: {f['score']:.3g}") for f in r["features"]["delta-confidence"]
    ]
    curve = rank_curve(
        ranking["rank"], ranking["score"], marked, "ΔC, nats", "Delta Token Confidence of every live feature, by rank"
    )
    chosen = r["chosen"]["delta-confidence"]
    return [
        figure(
            curve,
            "Delta Token Confidence of every live feature at 10 × its largest activation. Left, UP: the model becomes "
            f"less sure of its next token; right, DOWN: surer. Marked: the chosen features ({chosen['direction']}, "
            f"{chosen['size']}).",
        ),
        table(columns, rows, "The features that were steered with, and what the logit lens reads in their direction."),
    ]


def _choice(r: dict[str, Any]) -> list[Html]:
    columns = [
        Column("Candidates", numeric=False),
        Column("Set"),
        Column("Dose", "‖Δ‖/‖x‖"),
        Column("Utility", "points"),
        Column("Change of rate", "points"),
        Column("In band", "%"),
        Column("Texts"),
    ]
    chosen = [(c["criterion"], c["direction"], c["size"], c["dose"]) for c in r["chosen"].values()]
    rows: list[list[Html]] = []
    for cell in r["grid"]:
        key = (cell["criterion"], cell["direction"], cell["size"], cell["dose"])
        label = f"{NAMES[cell['criterion']]}, {cell['direction']}" + (" ✓" if key in chosen else "")
        rows.append(
            [
                tag("b", escape(label)) if key in chosen else escape(label),
                escape(cell["size"]),
                escape(f"{cell['dose']:g}"),
                escape(f"{POINTS * cell['utility']:+.1f}".replace("-", "−")),
                escape(f"{POINTS * cell['effect']:+.1f}".replace("-", "−")),
                escape(f"{POINTS * cell['in_band']:.0f}"),
                escape(cell["n_rows"]),
            ]
        )
    return [
        paragraph(
            "Direction, set and dose were chosen on validation prompts, before the held-out prompts were opened. A set "
            "is the candidates of a list with the largest mean utility (change of rate, texts outside the unsteered "
            "band counting 0); the table judges sets on the half of the prompts that did not choose them. Random "
            "candidates went through the same choice, which tells what the ranking adds to it. One dose serves all "
            f"arms: {r['dose']:g} of the residual's norm, at which the best sets do best together."
        ),
        details(f"All {len(rows)} configurations", table(columns, rows, "Validation prompts.")),
    ]


def _method(record: dict[str, Any]) -> list[Html]:
    r, config = record["results"], record["config"]
    hashes = ", ".join(f"{name} {value}" for name, value in record["hashes"].items())
    openings = record["test_split_openings"]
    return [
        paragraph(
            "Every text is one prompt steered with one feature: at each input position whose logits choose a token, "
            f"the residual at {r['site']} is moved along the feature's direction by {r['dose']:g} of its own norm. "
            f"Texts have {r['n_tokens']} tokens and never stop early, so all arms have the same dose and the same "
            "number of edits. Random draws are shared between arms, so that texts differ by the steering alone. "
            "Random features are drawn from all live features that no criterion chose; the most active feature is the "
            "one that moves the reconstruction of the prompt most."
        ),
        facts(
            [
                ("Model", f"{r['model']} at {r['site']}"),
                ("SAE", f"{r['sae']}, {r['n_features']:,} features"),
                ("Hashes", hashes),
                (
                    "Sampling",
                    f"temperature {config['temperature']:g}, top-p {config['top_p']:g}, seed {config['seed']}",
                ),
                (
                    "Texts per arm",
                    f"{r['n_prompts']} prompts × {config['replicates']} samples × {r['n_tokens']} tokens",
                ),
                ("Held-out prompts opened", ", ".join(str(o["time"]) for o in openings)),
                ("Versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
            ]
        ),
    ]


def _strip(tokens: list[str], fired: list[bool] | None) -> Html:
    """A text token by token, those at which the feature fires marked."""
    marks = fired or [False] * len(tokens)
    tokens = [token.lstrip() if i == 0 else token for i, token in enumerate(tokens)]
    return join([tag("mark", escape(t)) if mark else escape(t) for t, mark in zip(tokens, marks, strict=True)])


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥").strip() or "␣"
