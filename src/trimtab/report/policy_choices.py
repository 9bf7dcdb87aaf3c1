"""How the controls beside a policy were chosen, trained and scaled, in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.report.page import Column, Html, details, escape, table, tag


def choices(arms: Sequence[Mapping[str, Any]]) -> list[Html]:
    """A table to unfold, with a row for each arm, or for each run where they differ; nothing if nothing was chosen.

    Args:
        arms: as `evaluation.json` holds them: `chosen` and `kl_matches` list a mapping for each run.
    """
    rows: list[list[Html]] = []
    for arm in arms:
        for runs, lines in _by_run(arm["chosen"], arm["kl_matches"]):
            rows.append([escape(arm["label"]), escape(runs), tag("ul", *(tag("li", escape(line)) for line in lines))])
    columns = [Column("Arm", numeric=False), Column("Run", numeric=False), Column("Choice", numeric=False)]
    if not rows:
        return []
    shown = table(columns, rows, "On training and validation items.")
    return [details("How controls were chosen, trained and scaled", shown)]


def _by_run(chosen: Sequence[Mapping[str, Any]], matches: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Runs by their place, and what is said of them; once where all share it."""
    found: list[list[str]] = []
    for run in range(max(len(chosen), len(matches))):
        lines: list[str] = []
        if chosen:
            lines += named_values(chosen[min(run, len(chosen) - 1)])  # one stands for all where runs share the arm
        if matches:
            lines.append(_match(matches[min(run, len(matches) - 1)]))
        found.append(lines)
    if found and all(lines == found[0] for lines in found):
        return [("all" if len(found) > 1 else "–", found[0])]
    return [(str(number), lines) for number, lines in enumerate(found, 1)]


def named_values(values: Mapping[str, Any], within: str = "") -> list[str]:
    """`name: value` for each value, those of inner mappings behind their own name."""
    found: list[str] = []
    for name, value in values.items():
        label = within + str(name).replace("_", " ")
        if isinstance(value, Mapping):
            found += named_values(value, f"{label}, ")  # pyright: ignore[reportUnknownArgumentType]
        else:
            found.append(f"{label}: {_shown(value)}")
    return found


def _match(match: Mapping[str, Any]) -> str:
    said = (
        f"doses × {_shown(match['scale'])}: KL {_shown(match['reached'])} nats on validation, the policy's "
        f"{_shown(match['target'])}"
    )
    return said if match["within"] else f"{said}; not equal within {match['tolerance']:.0%}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(one) for one in value) or "none"  # pyright: ignore[reportUnknownVariableType]
    return "–" if value is None else str(value)
