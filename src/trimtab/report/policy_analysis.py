"""Where a policy's choices mattered, what its critic knows, which features it used: what `policy analyze` found."""

from __future__ import annotations

from typing import Any

from trimtab.report.curves import Curve, curve_plot
from trimtab.report.page import Column, Html, details, escape, figure, join, paragraph, table, tag
from trimtab.report.policy_files import PolicyFiles
from trimtab.report.policy_numbers import HIDDEN, absent, cell, feature_name, notes, plain_number, visible

ROWS = 40
"""Rows of a table at most; the files hold all."""
SHOWN_FORKS = 20
"""Branch points whose forks are listed."""
MEAN = -1
"""The step that stands for the mean over an item's decisions."""


def _command(files: PolicyFiles, part: str) -> str:
    return f"trimtab policy analyze {files.path} --parts {part}"


def _found(files: PolicyFiles, part: str) -> Any:
    return None if files.analysis is None else files.analysis[part]


def _source(files: PolicyFiles) -> str:
    found = files.analysis or {}
    return f"{found['split']}, {found['items']:,} items, {'greedy' if found['greedy'] else 'sampled'} actions"


def branch_section(files: PolicyFiles) -> list[Html]:
    """Tokens at which the choice of a feature changes the reward."""
    found = _found(files, "branch_points")
    if found is None:
        return [absent("Branch points were not looked for.", _command(files, "branch-points"))]
    tokens: list[dict[str, Any]] = sorted(found["tokens"], key=lambda t: (t["q_value"], -t["excess"]))
    points = [token for token in tokens if token["branch_point"]]
    order = {item: i for i, item in enumerate(dict.fromkeys(token["item"] for token in found["tokens"]))}

    def name(token: dict[str, Any]) -> str:
        return f"#{order[token['item']]}" if files.hides_text else str(token["item"])

    columns = [
        Column("Item", numeric=False),
        Column("Position"),
        Column("Token", numeric=False),
        Column("Feature"),
        Column("Reward"),
        Column("Flips", "policy's candidates"),
        Column("Flips", "random, equal KL"),
        Column("Excess"),
        Column("Without edit", numeric=False),
        Column("p"),
        Column("q"),
        Column("", numeric=False),
    ]
    rows = [
        [
            escape(name(t)),
            escape(t["position"]),
            escape(HIDDEN if files.hides_text else visible(t["token"])),
            escape(feature_name(t["feature"])),
            plain_number(t["reward"]),
            escape(f"{t['flips']}/{t['tried']}"),
            escape(f"{t['random_flips']}/{t['tried']}"),
            plain_number(t["excess"], "+.2f"),
            escape("flips" if t["flips_without"] else "–"),
            plain_number(t["p_value"], ".2g"),
            plain_number(t["q_value"], ".2g"),
            escape("branch point" if t["branch_point"] else ""),
        ]
        for t in tokens[:ROWS]
    ]
    said = (
        f"{len(points)} branch points among {len(tokens)} tokens of {found['items']} items ({_source(files)}), false "
        f"discovery rate {found['false_discovery_rate']:g}."
    )
    caption = f"The {len(rows)} tokens with the smallest q. p: Fisher's exact test; q: corrected for all tokens tried."
    content = [
        paragraph(said),
        tag("p", escape("Excess flip rate over random features: "), cell(found["excess"], signed=True),
            escape("; wrong items that some replaced decision improves: "), cell(found["rescued"]), escape(".")),
        table(columns, rows, caption),
    ]  # fmt: skip
    blocks = [_forks(files, token, f"{name(token)}, position {token['position']}") for token in points[:SHOWN_FORKS]]
    content += [block for block in blocks if block is not None]
    return [*content, *notes("Warnings", found["warnings"])]


def _forks(files: PolicyFiles, token: dict[str, Any], title: str) -> Html | None:
    forks = [f for f in files.forks or [] if (f["item"], f["step"]) == (token["item"], token["step"])]
    if not forks:
        return None
    columns = [
        Column("In its place", numeric=False),
        Column("Feature"),
        Column("Dose"),
        Column("Local KL", "nats"),
        Column("Reward"),
        Column("", numeric=False),
    ]
    rows = [
        [
            escape(fork["kind"]),
            escape(feature_name(fork["feature"])),
            plain_number(fork["dose"]),
            plain_number(fork["kl_local"]),
            plain_number(fork["reward"]),
            escape("flips" if fork["flip"] else ""),
        ]
        for fork in forks
    ]
    return details(f"Forks at {title}", table(columns, rows))


def critic_section(files: PolicyFiles) -> list[Html]:
    """The critic's curves, AUCs and verdicts."""
    found = _found(files, "critic")
    if found is None:
        return [absent("The critic was not judged.", _command(files, "critic"))]
    counts: dict[str, int] = found["counts"]
    content = [
        paragraph(f"Items ({_source(files)}): " + ", ".join(f"{n:,} {group}" for group, n in counts.items()) + ".")
    ]
    content += [
        paragraph(f"{v['group'].capitalize()}: {v['label'].replace('_', ' ')}: {v['reason']}.")
        for v in found["verdicts"]
    ]
    curves: list[Curve] = []
    for group in counts:
        points = [point for point in found["curve"] if point["group"] == group]
        if points:
            curves.append(Curve(group, [p["step"] for p in points], [p["mean"] for p in points]))
    if curves:
        drawn = curve_plot(curves, "value", "Mean value of the critic by step and outcome", steps="step of the answer")
        content.append(
            figure(
                drawn,
                "Mean value of the critic. Correct: right with and without the policy; corrected: right with it only; "
                "misguided: right without it only; incorrect: wrong with and without.",
            )
        )
    columns = [
        Column("Items", numeric=False),
        Column("Step"),
        Column("n"),
        Column("End right"),
        Column("Critic", "AUC, 95%"),
        Column("Probe", "AUC, 95%"),
        Column("Probe − critic", "95%"),
    ]
    rows = [
        [
            escape(s["group"]),
            escape("mean" if s["step"] == MEAN else s["step"]),
            escape(f"{s['n']:,}"),
            escape(f"{s['n_right']:,}"),
            cell(s["critic"]),
            cell(s["probe"]),
            cell(s["difference"], signed=True),
        ]
        for s in found["separations"]
    ]
    content.append(
        table(
            columns,
            rows,
            "How well the critic tells answers that end right, among items that are alike unsteered; beside it a probe "
            "on the same activations, cross-fitted.",
        )
    )
    helped = found["helped"]
    said = tag(
        "p",
        escape("Items wrong with and without the policy that some action helps: "),
        cell(helped["share"]),
        escape("; random directions: "),
        cell(helped["random"]),
        escape(f" ({helped['how']})."),
    )
    return [*content, said]


def layer_section(files: PolicyFiles) -> list[Html]:
    """Doses that each site tolerates, and the kinds of features that its policy chose."""
    layers: list[dict[str, Any]] = _found(files, "layers") or []
    if not layers:
        return [absent("Doses and kinds of features were not compared.", _command(files, "layers"))]
    doses = [
        [
            escape(layer["site"]),
            escape(f"{p['dose']:g} {layer['unit']}" + (" (trained)" if p["dose"] == layer["trained_dose"] else "")),
            cell(p["reward"]),
            cell(p["difference"], signed=True),
            cell(p["kl"]),
            plain_number(p["malformed"], ".3f"),
        ]
        for layer in layers
        for p in layer["doses"]
    ]
    kinds = [
        [
            escape(layer["site"]),
            escape(k["factor"]),
            cell(k["chosen"]),
            plain_number(k["by_use"], ".3f"),
            cell(k["live"]),
            cell(k["difference"], signed=True),
        ]
        for layer in layers
        for k in layer["kinds"]
    ]
    content = [
        table(
            [
                Column("Site", numeric=False),
                Column("Dose"),
                Column("Reward", "95%"),
                Column("− unsteered", "paired, 95%"),
                Column("KL", "nats per answer, 95%"),
                Column("Malformed"),
            ],
            doses,
            "The policy at several doses, on validation items.",
        )
    ]
    if kinds:
        content.append(
            table(
                [
                    Column("Site", numeric=False),
                    Column("Factor", numeric=False),
                    Column("Chosen features", "95%"),
                    Column("By use"),
                    Column("Live features", "95%"),
                    Column("Chosen − live", "95%"),
                ],
                kinds,
                "Share of a feature's activation variance that a factor explains (ε²), over features.",
            )
        )
    lines: list[str] = []
    for layer in layers:
        most = "no dose that was tried" if layer["tolerated"] is None else f"doses up to {layer['tolerated']:g}"
        note = f"; {layer['note']}" if layer["note"] else ""
        lines.append(
            f"{layer['site']} tolerates {most} ({layer['unit']}); {layer['chosen_features']} features used{note}"
        )
    return [*content, tag("ul", *(tag("li", escape(line)) for line in lines))]


def ledger_section(files: PolicyFiles) -> list[Html]:
    """Every feature used: how often, where, with what effect."""
    found = _found(files, "ledger")
    if found is None:
        return [absent("There is no ledger of features.", _command(files, "ledger"))]
    entries: list[dict[str, Any]] = found["entries"]
    columns = [
        Column("Feature", numeric=False),
        Column("Uses"),
        Column("Share", "of decisions"),
        Column("Items"),
        Column("Steps", "first, median, last"),
        Column("Local KL", "nats, 95%"),
        Column("Reward with − without", "95%"),
        *([] if files.hides_text else [Column("At tokens", numeric=False)]),
    ]
    rows: list[list[Html]] = []
    for e in entries[:ROWS]:
        row = [
            escape(e["feature"]),
            escape(f"{e['uses']:,}"),
            plain_number(e["share"], ".3f"),
            escape(f"{e['items']:,}"),
            escape(f"{e['first_step']}, {e['median_step']:g}, {e['last_step']}"),
            cell(e["kl_local"]),
            cell(e["reward_difference"], signed=True),
        ]
        if not files.hides_text:
            shown = [tag("span", escape(f"{visible(t['token'])} {t['count']}")) for t in e["tokens"]]
            row.append(tag("span", *shown, class_="lens"))
        rows.append(row)
    said = (
        f"{len(entries):,} features in {found['decisions']:,} decisions ({_source(files)}), {found['no_edit']:,} of "
        "them without an edit."
    )
    content = [paragraph(said), table(columns, rows, f"The {len(rows)} most used features.")]
    for e in [] if files.hides_text else entries[:ROWS]:
        if e["contexts"]:
            content.append(details(f"Feature {e['feature']} in context", *(_context(c) for c in e["contexts"])))
    return content


def _context(context: dict[str, Any]) -> Html:
    words = join([escape(context["before"]), tag("mark", escape(context["token"])), escape(context["after"])])
    about = f"{context['item']}, position {context['position']}, local KL {context['kl_local']:.3g}"
    return tag("p", tag("span", words, class_="tokens"), Html("<br>"), tag("small", escape(about)))
