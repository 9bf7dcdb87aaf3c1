"""Looks at items that nothing may be chosen on: every run records its own, and what was seen before is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import UserError
from trimtab.runs import Run, read_record
from trimtab.runs.record import RECORD_NAME

OPENED = ("test", "all")
"""Splits with such items."""


def open_items(runs: Sequence[Run], split: str, ids: Sequence[str]) -> list[str]:
    """Record in every run that items are looked at now.

    Args:
        runs: whose policies answer them.
        split: its name, with the part that it is (`test[:64]`).
        ids: of the items.

    Returns:
        Warnings, if a run looked at any of them before.
    """
    warnings: list[str] = []
    for run in runs:
        if before := _openings(run.record_dict, ids):
            warnings.append(f"the test split was opened before ({before}× in {run.path.name})")
        run.open_split(split, ids)
    return warnings


def opened_elsewhere(runs: Sequence[Run], ids: Sequence[str]) -> list[str]:
    """A warning if runs beside these looked at the items: what was seen there may have shaped what was trained here."""
    own = {run.path.resolve() for run in runs}
    task = runs[0].config["task"]  # as it was called, like a task of one's own by module and class
    found: list[str] = []
    for place in sorted({path.parent for path in own}):
        for path in sorted(file.parent for file in place.glob(f"*/{RECORD_NAME}")):
            if path.resolve() in own:
                continue
            try:
                record = read_record(path)
            except UserError:
                continue
            if record["config"].get("task") == task and _openings(record, ids):
                found.append(path.name)
    if not found:
        return []
    return [f"runs beside these looked at the same test items before ({', '.join(found)}): use --skip for fresh ones"]


def _openings(record: Mapping[str, Any], ids: Sequence[str]) -> int:
    """How often a run looked at any of these items."""
    splits, mine = record["splits"], set(ids)
    names = [opening["split"] for opening in record["test_split_openings"]]
    return sum(name.startswith(OPENED) and not mine.isdisjoint(splits.get(name, ())) for name in names)
