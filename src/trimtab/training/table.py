"""What became of the members of a bank: `bank.parquet` and the table on the screen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from trimtab.errors import UserError
from trimtab.runs import config_dict, write_table
from trimtab.runs.tables import SHARE, Column, result_table
from trimtab.training.advice import Advised, variance_text
from trimtab.training.export import TrainResult
from trimtab.training.members import Member

TABLE = "bank.parquet"
Ending = Literal["done", "failed"]


@dataclass(frozen=True, kw_only=True)
class MemberRow(Advised):
    """One member of a bank, as far as it has come."""

    name: str
    status: Ending
    site: str
    arch: str
    n_features: int
    seed: int
    l0_target: float | None
    l0: float | None = None
    """Reached on held-out rows."""
    l0_reached_target: bool | None = None
    sparsity_weight: float | None = None
    """Of the penalty, at the end."""
    explained_variance: float | None = None
    dead_share: float | None = None
    dense_share: float | None = None
    steps: int | None = None
    rows: int | None = None
    seconds: float | None = None
    """That its steps took, in the call that ended it."""
    path: str
    """Of the SAE; of the member's run if it failed; empty if it never began."""
    checkpoint: str = ""
    """The last good one, if the member failed."""
    error: str = ""
    """Why it failed."""
    config: str = "{}"
    """All settings, as JSON."""

    @property
    def line(self) -> str:
        """What became of it, in one line."""
        if self.status == "failed":
            return f"{self.name} failed: {self.error}"
        return f"{self.name} done: EV {variance_text(self.explained_variance)}, L0 {self.l0:.2f}, {self.seconds:.0f} s"


def done_row(member: Member, result: TrainResult) -> MemberRow:
    """The row of a member that was trained."""
    fields = asdict(result)
    told = {field.name for field in dataclasses.fields(MemberRow)} & set(fields) - set(_about(member))
    return MemberRow(status="done", path=str(fields["sae"]), **_about(member), **{name: fields[name] for name in told})


def failed_row(member: Member, error: Exception, run: Path | None = None, checkpoint: Path | None = None) -> MemberRow:
    """The row of a member that failed."""
    reason = error.line if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return MemberRow(
        status="failed",
        path=str(run or ""),
        checkpoint=str(checkpoint or ""),
        error=reason,
        **_about(member),
    )


def write_rows(path: Path, rows: Sequence[MemberRow]) -> None:
    """Write the rows as Parquet, whole."""
    import pyarrow as pa

    kinds: dict[str, pa.DataType] = {
        "str": pa.string(), "Ending": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(),
    }  # fmt: skip
    annotations = {name: str(kind).split(" ")[0] for name, kind in MemberRow.__annotations__.items()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in annotations.items()])
    write_table(path, pa.Table.from_pylist([asdict(row) for row in rows], schema=schema))


def render_rows(rows: Sequence[MemberRow]) -> list[Table | Text]:
    """A table of the members that are done, and what went wrong or short with others."""
    columns = [
        Column("member", "name", whole=True),
        Column("EV", lambda row: variance_text(row.explained_variance), ".4f"),
        Column("L0", "l0", ".2f"),
        Column("target", "l0_target", "g"),
        Column("dead", "dead_share", SHARE),
        Column("dense", "dense_share", SHARE),
        Column("seconds", "seconds", ".0f"),
    ]
    done = [row for row in rows if row.status == "done"]
    said: list[Text] = []
    for row in rows:
        if row.status == "failed":
            kept = f"; checkpoint {row.checkpoint}" if row.checkpoint else ""
            said.append(Text(f"{row.name} failed: {row.error}{kept}", style="red"))
        elif row.advice:
            said.append(Text(f"{row.name}: {row.advice}", style="yellow"))
    return [*([result_table(columns, done, framed=False)] if done else []), *said]


def _about(member: Member) -> dict[str, Any]:
    config = member.config
    values = member.values if config is None else config_dict(config)
    return {
        "name": member.name,
        "site": member.site,
        "arch": str(values.get("arch", "topk")),
        "n_features": int(values.get("n_features", 4096)),
        "seed": int(values.get("seed", 0)),
        "l0_target": None if config is None else config.l0_target,
        "config": json.dumps({"site": member.site, **{k: v for k, v in values.items() if v is not None}}, default=str),
    }
