"""Ranked features as a table: one column per fact, one row per feature, best first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.runs import whole_number, write_table
from trimtab.runs.figures import Curve, plot_ranks
from trimtab.runs.results import Result
from trimtab.runs.tables import Column, Table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_SCHEMA = pa.schema(
    [
        ("criterion", pa.string()),
        ("rank", pa.int32()),
        ("feature", pa.int32()),
        ("score", pa.float64()),
        ("direction", pa.string()),
        ("relative_dose", pa.float32()),
        ("firing_rate", pa.float64()),
        ("max_activation", pa.float32()),
        ("top_tokens", pa.list_(pa.string())),
    ]
)
_MEANING = pa.field("meaning", pa.string())
"""A column of dictionaries that say what their features mean."""
_FIRES_ON = pa.field("fires_on", pa.list_(pa.string()))
"""A column of dictionaries that have examples."""
_WORDS = ("top_tokens", "meaning", "fires_on")
_COLUMNS = ("feature", "score", "relative_dose", "firing_rate", "max_activation")


@dataclass(frozen=True, kw_only=True, repr=False)
class FeatureTable(Result):
    """Features ranked by one criterion, largest score first. All columns have n rows."""

    criterion: str
    """The criterion's label: its name, and its settings where they are not the default."""
    signed: bool
    """Whether negative scores are an end of the ranking in their own right."""
    feature: NDArray[np.int32]
    score: NDArray[np.float64]
    relative_dose: NDArray[np.float32]
    """‖Δ‖/‖x‖ of the amplification that was scored; NaN where nothing was amplified."""
    firing_rate: NDArray[np.float64]
    """Share of the statistics' tokens on which the feature fires; NaN if unknown."""
    max_activation: NDArray[np.float32]
    """Largest activation in model units; NaN if unknown."""
    top_tokens: tuple[tuple[str, ...], ...]
    """What the logit lens reads in the feature's decoder row, most likely first; none outside the residual stream."""
    meaning: tuple[str, ...] = ()
    """What the dictionary says that the feature means; no column where it says nothing."""
    fires_on: tuple[tuple[str, ...], ...] = ()
    """Tokens of the examples beside the dictionary at which the feature is strongest; no column without examples."""

    def __len__(self) -> int:
        return len(self.feature)

    @property
    def direction(self) -> NDArray[np.str_]:
        """`up`, or `down` where a signed criterion's score is negative."""
        return np.where(self.signed & (self.score < 0), "down", "up")

    def take(self, rows: NDArray[np.integer] | Sequence[int]) -> FeatureTable:
        """The given rows, in that order."""
        rows = np.asarray(rows, dtype=np.intp)
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        taken = {name: column[rows] for name, column in columns.items() if isinstance(column, np.ndarray)}
        words = {name: tuple(columns[name][i] for i in rows) for name in _WORDS if columns[name]}
        return replace(self, **taken, **words)

    def top(self, count: int) -> FeatureTable:
        """The features of largest score, largest first."""
        return self.take(np.arange(min(whole_number(count, "count", 0), len(self))))

    def bottom(self, count: int) -> FeatureTable:
        """The features of smallest score, smallest first."""
        return self.take(np.arange(len(self))[::-1][: whole_number(count, "count", 0)])

    def to_arrow(self) -> pa.Table:
        """One row per feature, with its rank (0 for the largest score)."""
        columns = {
            "criterion": [self.criterion] * len(self),
            "rank": np.arange(len(self), dtype=np.int32),
            "direction": self.direction,
            **{name: _nullable(getattr(self, name)) for name in _COLUMNS},
            "top_tokens": [list(tokens) for tokens in self.top_tokens],
        }
        table = pa.table(columns, schema=_SCHEMA)
        if self.meaning:
            table = table.append_column(_MEANING, [list(self.meaning)])
        return table.append_column(_FIRES_ON, [list(map(list, self.fires_on))]) if self.fires_on else table

    def records(self) -> list[dict[str, Any]]:
        """One mapping per feature."""
        return self.to_arrow().drop_columns(["criterion", "rank"]).to_pylist()

    def headline(self) -> str:
        return f"{len(self):,} features by {self.criterion}"

    def tables(self) -> dict[str, Table]:
        """Both ends, or all features in their order where they are few."""
        if len(self) <= SHOWN:
            return {"features": Table(columns=self._shown(), rows=self.records())}
        return self.ends(SHOWN)

    def ends(self, count: int) -> dict[str, Table]:
        """The features of largest score and, where negative scores are an end of their own, of smallest."""
        ends = {"largest": self.top(count), **({"smallest": self.bottom(count)} if self.signed else {})}
        return {
            end: Table(columns=self._shown(), rows=found.records(), title=f"{self.criterion}, {end} first")
            for end, found in ends.items()
        }

    def _shown(self) -> tuple[Column, ...]:
        first, *rest, lens = _SHOWN_COLUMNS
        fires_on = Column("tokens it fires on", lambda row: "  ".join(map(_visible, row["fires_on"])))
        return (
            first,
            *[Column("meaning", "meaning")] * bool(self.meaning),
            *rest,
            *[fires_on] * bool(self.fires_on),
            lens,
        )

    def to_frame(self, table: str = "") -> pd.DataFrame:
        """All rows, or those that a table shows."""
        return super().to_frame(table) if table else self.to_arrow().to_pandas()

    def draw(self, ax: Axes) -> None:
        """Scores by rank."""
        plot_ranks(ax, Curve(self.criterion, range(len(self)), self.score.tolist()), self.criterion)

    @classmethod
    def ranked(cls, *, criterion: str, signed: bool, order_by: NDArray[np.float64], **columns: object) -> FeatureTable:
        """A table sorted by score; equal scores keep the order they came in."""
        table = cls(criterion=criterion, signed=signed, score=order_by, **columns)  # type: ignore[arg-type]
        return table.take(np.argsort(-order_by, kind="stable"))


def side_by_side(tables: Sequence[FeatureTable]) -> pa.Table:
    """Rankings of the same features as one table: a row per feature, in the order of the first ranking, and a column of
    scores per criterion.

    Raises:
        UserError: there is no ranking, two are by one criterion, or they are of different features.
    """
    if not tables:
        raise UserError("the rankings", "there is none", "give at least one")
    first, *others = tables
    if len({table.criterion for table in tables}) < len(tables):
        raise UserError("the rankings", "two are by one criterion", "give one of each")
    scores = {first.criterion: pa.array(first.score)}
    for table in others:
        if not np.array_equal(np.sort(table.feature), np.sort(first.feature)):
            what = f"the rankings by {first.criterion} and {table.criterion}"
            raise UserError(what, "they are of different features", "rank the same features, as `rank_by` does")
        place = np.argsort(table.feature)[np.searchsorted(np.sort(table.feature), first.feature)]
        scores[table.criterion] = pa.array(table.score[place])
    about = first.to_arrow().drop_columns(["criterion", "rank", "score", "direction", "relative_dose"])
    names, columns = ["feature", *scores], [about["feature"], *scores.values()]
    for name in about.column_names[1:]:
        names, columns = [*names, name], [*columns, about[name]]
    return pa.table(columns, names=names)


def write_feature_tables(path: str | Path, tables: Sequence[FeatureTable]) -> None:
    """Write tables of several criteria into one Parquet file, whole. Raises `UserError` if the disk refuses."""
    joined = pa.concat_tables([table.to_arrow() for table in tables])
    signed = json.dumps({table.criterion: table.signed for table in tables})
    write_table(path, joined.replace_schema_metadata({"trimtab.signed": signed}))


def read_feature_tables(path: str | Path) -> list[FeatureTable]:
    """Read what `write_feature_tables` wrote, one table per criterion.

    Raises:
        UserError: the file is missing or damaged, or is another kind of table.
    """
    try:
        table = pq.read_table(path)
        signed = json.loads((table.schema.metadata or {})[b"trimtab.signed"])
        words = [field for field in (_MEANING, _FIRES_ON) if field.name in table.column_names]
        table = table.cast(pa.schema([*_SCHEMA, *words]).with_metadata(table.schema.metadata))
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "rank the features first, with `trimtab rank`") from None
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(str(path), "not readable as a table of ranked features", "rank the features again") from error
    found = []
    for criterion, is_signed in signed.items():
        part = table.filter(pa.array(table["criterion"].to_numpy() == criterion))
        columns: dict[str, Any] = {name: part[name].to_numpy() for name in _COLUMNS}  # null becomes NaN
        for name in ("top_tokens", *(field.name for field in words)):
            columns[name] = tuple(tuple(row) if isinstance(row, list) else row for row in part[name].to_pylist())
        found.append(FeatureTable(criterion=criterion, signed=is_signed, **columns))
    return found


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥").strip() or "␣"


SHOWN = 10
"""Features of each end that a ranking shows of itself."""
_SHOWN_COLUMNS = (
    Column("feature", "feature", "d", whole=True),
    Column("score", "score", ".4g", whole=True),
    Column("dose ‖Δ‖/‖x‖", "relative_dose", ".2f", whole=True),
    Column("fires on", "firing_rate", ".3%", whole=True),
    Column("largest", "max_activation", ".4g", whole=True),
    Column("tokens by logit lens", lambda row: "  ".join(map(_visible, row["top_tokens"]))),
)


def _nullable(values: NDArray[np.number]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))
