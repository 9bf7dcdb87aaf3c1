"""What the run of a policy left in its directory; parts that are not there are None."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import UserError
from trimtab.runs import read_json, read_metrics, read_record

COMMANDS = ("policy train", "policy evaluate")
STRIPS = 60
"""Rows of a trace that are read."""


class Row(NamedTuple):
    """One decoded answer: its tokens in order, and the edits by the position of the edited token."""

    sample: int
    branch: int
    tokens: list[dict[str, Any]]
    edits: dict[int, list[dict[str, Any]]]


class TokenTrace(NamedTuple):
    """The first rows of a trace, and what there is in all."""

    rows: list[Row]
    n_rows: int
    n_tokens: int
    n_edits: int


@dataclass(frozen=True, kw_only=True)
class PolicyFiles:
    """A run directory as the report needs it."""

    path: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    headroom: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    items: list[dict[str, Any]] | None
    """Rewards of each item under each arm; no texts."""
    trace: TokenTrace | None
    analysis: dict[str, Any] | None
    forks: list[dict[str, Any]] | None

    @classmethod
    def read(cls, path: Path) -> PolicyFiles:
        """Read what is there.

        Raises:
            UserError: it is no run of a policy, or a file is damaged.
        """
        record = read_record(path)
        if record["command"] not in COMMANDS:
            raise UserError(
                f"run {path}",
                f"it belongs to `{record['command']}`, and is no policy's",
                "name a run of `policy train`",
            )
        columns = ("task", "arm", "group", "reward", "malformed")
        return cls(
            path=path,
            record=record,
            metrics=read_metrics(path),
            headroom=read_json(path / "headroom.json"),
            evaluation=read_json(path / "evaluation.json"),
            items=_rows(path / "evaluation_items.parquet", columns),
            trace=_trace(path),
            analysis=read_json(path / "analysis" / "analysis.json"),
            forks=_rows(path / "analysis" / "branch_forks.parquet"),
        )

    @property
    def task(self) -> str:
        """Name of the task, "" if nothing says it."""
        if "task" in self.record["config"]:
            return str(self.record["config"]["task"])
        return "" if self.evaluation is None else str(self.evaluation["result"]["task"])

    @property
    def hides_text(self) -> bool:
        """Whether prompts and answers must not be shown; where nothing says, they are hidden."""
        said = self.record.get("hides_text")
        return said if isinstance(said, bool) else True


def _rows(path: Path, columns: Sequence[str] | None = None, filters: Any = None) -> list[dict[str, Any]] | None:
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        names = None if columns is None else list(columns)
        return parquet.read_table(path, columns=names, filters=filters).to_pylist()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        why = str(error).splitlines()[0]
        raise UserError(str(path), f"not readable as Parquet ({why})", "run its command again") from error


def _trace(path: Path) -> TokenTrace | None:
    names = _rows(path / "tokens.parquet", ("sample", "branch"))
    edited = _rows(path / "edits.parquet", ("feature",))
    if names is None or edited is None:
        return None
    keys = list(dict.fromkeys((name["sample"], name["branch"]) for name in names))
    first = keys[:STRIPS]
    only = [("sample", "in", sorted({sample for sample, _ in first}))] if first else None
    tokens: defaultdict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    edits: defaultdict[tuple[int, int], dict[int, list[dict[str, Any]]]] = defaultdict(dict)
    for token in _rows(path / "tokens.parquet", filters=only) or []:
        tokens[token["sample"], token["branch"]].append(token)
    for edit in _rows(path / "edits.parquet", filters=only) or []:
        edits[edit["sample"], edit["branch"]].setdefault(edit["position"], []).append(edit)
    rows = [Row(*key, sorted(tokens[key], key=lambda token: token["position"]), edits[key]) for key in first]
    return TokenTrace(rows, len(keys), len(names), sum(edit["feature"] >= 0 for edit in edited))
