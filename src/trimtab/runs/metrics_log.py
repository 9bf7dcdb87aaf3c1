"""`metrics.jsonl`: one whole line for each logged step. A line torn by a kill is dropped when the run is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from trimtab.runs.atomic import append_line, write_bytes
from trimtab.runs.config import json_safe

METRICS_NAME = "metrics.jsonl"


def append_metrics(path: Path, metrics: Mapping[str, Any], step: int) -> None:
    """Append `{"step": step, **metrics}` as one line; NaN becomes null."""
    line = json_safe({"step": step, **metrics})
    append_line(path, json.dumps(line, ensure_ascii=False, allow_nan=False))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The logged lines of the run directory `path`, whole ones only; none if it logged nothing."""
    file = Path(path) / METRICS_NAME
    return [line for line in map(_parse, _whole_lines(file)) if line is not None]


def repair_metrics(path: Path) -> None:
    """Drop what follows the last whole line."""
    if not path.exists():
        return
    lines = _whole_lines(path)
    while lines and _parse(lines[-1]) is None:
        lines.pop()
    length = sum(map(len, lines))
    if length != path.stat().st_size:
        os.truncate(path, length)


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`."""
    if not path.exists():
        return
    parsed = [(line, _parse(line)) for line in _whole_lines(path)]
    kept = [line for line, fields in parsed if fields is not None and fields.get("step", 0) <= step]
    if len(kept) < len(parsed):
        write_bytes(path, b"".join(kept))


def _whole_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        fields: Any = json.loads(line)
    except ValueError:
        return None
    return cast(dict[str, Any], fields) if isinstance(fields, dict) else None
