"""What became of the members of a bank: `bank.parquet` and the table on the screen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.table import Table
from rich.text import Text

from trimtab.errors import UserError
from trimtab.runs import config_dict, field_types, write_table
from trimtab.runs.tables import SHARE, Column, result_table
from trimtab.training.members import Member
from trimtab.training.result import TrainResult

TABLE = "bank.parquet"
MEASURED = (
    "l0", "l0_reached_target", "sparsity_weight", "explained_variance", "dead_share", "dense_share", "steps", "rows",
    "seconds",
)  # fmt: skip
"""What the table says of a member's result."""


@dataclass(frozen=True, kw_only=True)
class MemberRow:
    """One member of a bank, as far as it has come."""

    name: str
    site: str
    arch: str
    n_features: int
    seed: int
    l0_target: float | None
    result: TrainResult | None = None
    """None if it failed."""
    path: str = ""
    """Of the SAE; of the member's run if it failed; empty if it never began."""
    checkpoint: str = ""
    """The last good one, if the member failed."""
    error: str = ""
    """Why it failed."""
    config: str
    """All settings, as JSON."""

    @classmethod
    def done(cls, member: Member, result: TrainResult) -> MemberRow:
        """The row of a member that was trained."""
        return cls(**_about(member), result=result, path=str(result.sae))

    @classmethod
    def failed(cls, member: Member, error: Exception, path: str = "", checkpoint: str = "") -> MemberRow:
        """The row of a member that failed."""
        reason = error.line if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return cls(**_about(member), path=path, checkpoint=checkpoint, error=reason)

    @property
    def status(self) -> str:
        """`done` or `failed`."""
        return "failed" if self.result is None else "done"

    @property
    def line(self) -> str:
        """What became of it, in one line."""
        r = self.result
        if r is None:
            return f"{self.name} failed: {self.error}"
        return f"{self.name} done: EV {r.variance_text}, L0 {r.l0:.2f}, {r.seconds:.0f} s"

    def flat(self) -> dict[str, Any]:
        """Plain values by column of the table."""
        measured = {name: getattr(self.result, name, None) for name in MEASURED}
        own = {name: value for name, value in vars(self).items() if name != "result"}
        return {**own, "status": self.status, **measured}


def write_rows(path: Path, rows: Sequence[MemberRow]) -> None:
    """Write the rows as Parquet, whole."""
    import pyarrow as pa

    types = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    kinds = {**field_types(TrainResult), **field_types(MemberRow), "status": str}
    columns = [(name, next(iter(get_args(kinds[name])), kinds[name])) for name in rows[0].flat()]
    schema = pa.schema([(name, types.get(kind, pa.string())) for name, kind in columns])
    write_table(path, pa.Table.from_pylist([row.flat() for row in rows], schema=schema))


def render_rows(rows: Sequence[MemberRow]) -> list[Table | Text]:
    """A table of the members that are done, and what went wrong or short with others."""
    columns = [
        Column("member", "name", whole=True),
        Column("EV", "result.variance_text", ".4f"),
        Column("L0", "result.l0", ".2f"),
        Column("target", "l0_target", "g"),
        Column("dead", "result.dead_share", SHARE),
        Column("dense", "result.dense_share", SHARE),
        Column("seconds", "result.seconds", ".0f"),
    ]
    said: list[Text] = []
    for row in rows:
        if row.result is None:
            kept = f"; checkpoint {row.checkpoint}" if row.checkpoint else ""
            said.append(Text(f"{row.line}{kept}", style="red"))
        elif row.result.advice:
            said.append(Text(f"{row.name}: {row.result.advice}", style="yellow"))
    done = [row for row in rows if row.result is not None]
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
