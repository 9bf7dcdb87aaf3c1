"""Answers token by token: how much each edit changed the next token, and what was chosen there."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

from trimtab.report.page import number, visible
from trimtab.report.run_files import AnswerTokens, RunFiles

BOUNDS = (0.001, 0.01, 0.1, 1.0)
"""Local divergences, in nats, at which the colour changes."""
TOKENS_PER_STRIP = 160
TOKENS = 6_000
"""Of all strips together."""
LEGEND = [(f"k k{i}", f"from {bound:g}") for i, bound in enumerate(BOUNDS, start=1)]


def strips(files: RunFiles) -> dict[str, Any] | None:
    """The first answers of the trace; None if there is no trace."""
    trace = files.trace
    if trace is None:
        return None
    branching = _branch_points(files)
    found: list[dict[str, Any]] = []
    left = TOKENS
    for row in trace.rows:
        if left <= 0:
            break
        shown = row.tokens[: min(TOKENS_PER_STRIP, left)]
        left -= len(shown)
        found.append(_strip(files, row, shown, branching))
    return {
        "rows": found, "of": trace.n_rows, "edits": trace.n_edits, "tokens": trace.n_tokens,
        "branching": bool(branching), "legend": [("k k0", f"below {BOUNDS[0]:g}"), *LEGEND],
    }  # fmt: skip


def _strip(
    files: RunFiles, row: AnswerTokens, shown: Sequence[dict[str, Any]], branching: set[tuple[str, int]]
) -> dict[str, Any]:
    item = _item(files, row.sample)
    label = f"{row.sample}" + f".{row.branch}" * bool(row.branch)
    reward = next((t["reward"] for t in reversed(row.tokens) if t["reward"] is not None), None)
    tokens: list[dict[str, str]] = []
    for token in shown:
        edits = row.edits.get(token["position"] - 1, [])
        features = [edit["feature"] for edit in edits if edit["feature"] >= 0]
        framed = " branch" * (item is not None and (item, token["position"] - 1) in branching)
        kl = token["kl_local"]
        tokens.append(
            {
                "text": f"@{token['position']}" if files.hides_text else visible(token["text"]),
                "features": ", ".join(map(files.feature, features)) or "–",
                "class": ("k" if kl is None else f"k k{bisect.bisect_right(BOUNDS, kl)}") + framed,
                "title": "\n".join(_hover(files, token, edits)),
            }
        )
    said = "" if reward is None else f"reward {number(reward, '.3g')}"
    shown_item = "" if item is None or files.hides_text else item  # some ids say what is asked for
    more = len(row.tokens) - len(shown)
    return {"label": label, "item": shown_item, "said": said, "tokens": tokens, "more": more}


def _hover(files: RunFiles, token: dict[str, Any], edits: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"position {token['position']}" + ("" if files.hides_text else f": {visible(token['text'])}")]
    for edit in edits:
        if edit["feature"] >= 0:
            lines.append(
                f"feature {files.feature(edit['feature'])}: dose {edit['requested_dose']:g} {edit['unit']}, "
                f"‖Δ‖/‖x‖ {number(abs(edit['relative_dose']), '.3g')}"
            )
        else:
            lines.append("no edit")
        if edit["action_logp"] is not None:
            allowed = "" if edit["n_allowed"] is None else f" among {edit['n_allowed']:,} features allowed"
            lines.append(f"probability {number(math.exp(edit['action_logp']), '.3g')}{allowed}")
    value = token["value"] if token["value"] is not None else next((e["value"] for e in edits), None)
    if value is not None:
        lines.append(f"value {number(value)}")
    for name, label in (("kl_local", "KL of this edit"), ("kl_total", "KL of all edits")):
        if token[name] is not None:
            lines.append(f"{label} {number(token[name], '.3g')} nats")
    for name, label in () if files.hides_text else (("top_with", "with"), ("top_without", "without")):
        top = [f"{visible(t['text'])} {number(math.exp(t['logp']), '.2f')}" for t in token[name] or ()]
        lines += [f"{label}: {', '.join(top)}"] * bool(top)
    return lines


def _item(files: RunFiles, sample: int) -> str | None:
    """Id of the item that a row answers: the trace numbers the items of the split that was evaluated."""
    if files.evaluation is None:
        return None
    ids = files.record["splits"].get(files.evaluation["result"]["split"], [])
    return str(ids[sample]) if sample < len(ids) else None


def _branch_points(files: RunFiles) -> set[tuple[str, int]]:
    """Items and positions of edited tokens, where the analysis is of the answers that the strips show."""
    found = files.analysis
    if found is None or not found["greedy"] or found["branch_points"] is None or files.evaluation is None:
        return set()
    if found["split"] != files.evaluation["result"]["split"].partition("[")[0]:
        return set()
    return {(token["item"], token["position"]) for token in found["branch_points"]["tokens"] if token["branch_point"]}
