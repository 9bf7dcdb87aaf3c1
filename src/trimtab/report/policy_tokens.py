"""Answers token by token: how much each edit changed the next token, and what was chosen there."""

from __future__ import annotations

import bisect
import math
from typing import Any

from trimtab.report.page import Html, escape, join, paragraph, tag
from trimtab.report.policy_arms import evaluate_command
from trimtab.report.policy_files import PolicyFiles, Row
from trimtab.report.policy_numbers import absent, feature_name, visible

BOUNDS = (0.001, 0.01, 0.1, 1.0)
"""Local divergences, in nats, at which the colour changes."""
TOKENS_PER_STRIP = 160
TOKENS = 6_000
"""Of all strips together."""


def token_section(files: PolicyFiles) -> list[Html]:
    """The first answers of the trace as strips."""
    trace = files.trace
    if trace is None:
        return [absent("There is no trace of the policy's edits.", evaluate_command(files))]
    branching = _branch_points(files)
    strips: list[Html] = []
    left = TOKENS
    for row in trace.rows:
        if left <= 0:
            break
        shown = row.tokens[: min(TOKENS_PER_STRIP, left)]
        left -= len(shown)
        strips.append(_strip(files, row, shown, branching))
    said = (
        f"The first {len(strips)} of {trace.n_rows:,} answers, not picked; {trace.n_edits:,} edits at "
        f"{trace.n_tokens:,} tokens in all. Colour: KL between the token's distributions with and without the one edit "
        "before it. "
        "Point at a token for the feature, its dose and what it changed; below each token stands the feature."
    )
    if files.hides_text:
        said += " The task holds harmful prompts: positions stand in place of texts."
    if branching:
        said += " Framed: a branch point, where another feature changes the reward."
    return [paragraph(said), _legend(), *strips]


def _strip(files: PolicyFiles, row: Row, shown: list[dict[str, Any]], branching: set[tuple[str, int]]) -> Html:
    item = _item(files, row.sample)
    cells: list[Html] = []
    for token in shown:
        edits = row.edits.get(token["position"] - 1, [])
        features = [feature_name(edit["feature"]) for edit in edits] or [feature_name(-1)]
        framed = " branch" if item is not None and (item, token["position"] - 1) in branching else ""
        words = f"@{token['position']}" if files.hides_text else visible(token["text"])
        cells.append(
            tag(
                "span",
                tag("span", escape(words)),
                tag("small", escape(", ".join(features).replace("no edit", "–"))),
                class_=f"{_colour(token['kl_local'])}{framed}",
                title=_hover(token, edits, hide=files.hides_text),
            )
        )
    if len(shown) < len(row.tokens):
        cells.append(tag("em", escape(f"… {len(row.tokens) - len(shown)} more")))
    label = f"#{row.sample}" + (f".{row.branch}" if row.branch else "")
    if item is not None and not files.hides_text:  # some ids say what is asked for
        label += f" {item}"
    reward = next((t["reward"] for t in reversed(row.tokens) if t["reward"] is not None), None)
    said = "" if reward is None else f"reward {reward:.3g}"
    return tag("div", tag("p", escape(label), tag("small", escape(said))), tag("div", *cells), class_="strip")


def _hover(token: dict[str, Any], edits: list[dict[str, Any]], *, hide: bool) -> str:
    lines = [f"position {token['position']}" + ("" if hide else f": {visible(token['text'])}")]
    for edit in edits:
        if edit["feature"] >= 0:
            lines.append(
                f"feature {edit['feature']}: dose {edit['requested_dose']:g} {edit['unit']}, "
                f"‖Δ‖/‖x‖ {abs(edit['relative_dose']):.3g}"
            )
        else:
            lines.append("no edit")
        if edit["action_logp"] is not None:
            allowed = "" if edit["n_allowed"] is None else f" among {edit['n_allowed']:,} features allowed"
            lines.append(f"probability {math.exp(edit['action_logp']):.3g}{allowed}")
    value = token["value"] if token["value"] is not None else next((e["value"] for e in edits), None)
    if value is not None:
        lines.append(f"value {value:.3f}")
    for name, label in (("kl_local", "KL of this edit"), ("kl_total", "KL of all edits")):
        if token[name] is not None:
            lines.append(f"{label} {token[name]:.3g} nats")
    if not hide:
        for name, label in (("top_with", "with"), ("top_without", "without")):
            if token[name]:
                lines.append(
                    f"{label}: " + ", ".join(f"{visible(t['text'])} {math.exp(t['logp']):.2f}" for t in token[name])
                )
    return "\n".join(lines)


def _colour(kl: float | None) -> str:
    return "k" if kl is None else f"k k{bisect.bisect_right(BOUNDS, kl)}"


def _legend() -> Html:
    names = [f"below {BOUNDS[0]:g}", *(f"from {bound:g}" for bound in BOUNDS)]
    parts = [tag("span", tag("span", escape(name)), class_=f"k k{i}") for i, name in enumerate(names)]
    return tag("div", tag("p", escape("nats")), tag("div", join(parts)), class_="strip legend")


def _item(files: PolicyFiles, sample: int) -> str | None:
    """Id of the item that a row answers: the trace numbers the items of the split that was evaluated."""
    if files.evaluation is None:
        return None
    ids = files.record["splits"].get(files.evaluation["result"]["split"], [])
    return str(ids[sample]) if sample < len(ids) else None


def _branch_points(files: PolicyFiles) -> set[tuple[str, int]]:
    """Items and positions of edited tokens, where the analysis is of the answers that the strips show."""
    found = files.analysis
    if found is None or not found["greedy"] or found["branch_points"] is None or files.evaluation is None:
        return set()
    if found["split"] != files.evaluation["result"]["split"].partition("[")[0]:
        return set()
    return {(token["item"], token["position"]) for token in found["branch_points"]["tokens"] if token["branch_point"]}
