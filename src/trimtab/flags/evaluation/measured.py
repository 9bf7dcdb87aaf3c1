"""What an evaluation measures of one model: numbers of each example under a key, kept as a table.

Intervals are computed from these alone, so that what is read back from a run is compared as if it were measured now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.runs import write_table
from trimtab.runs.tables import Column
from trimtab.stats import Interval, student_mean


class Measured(NamedTuple):
    """Numbers under a key."""

    key: dict[str, str | int]
    values: NDArray[np.float64]
    """One for each example, or each example and concept, flat."""


class Part(NamedTuple):
    """What one part of the evaluation measured of one model."""

    rows: list[Measured]
    seconds: float

    def of(self, **key: str | int) -> NDArray[np.float64]:
        """The numbers under a key."""
        return next(row.values for row in self.rows if row.key == key)


def write_part(path: Path, part: Part) -> None:
    """Write a part as a Parquet file: the keys' columns, `values` and `seconds`."""
    names = list(dict.fromkeys(name for row in part.rows for name in row.key))
    columns: dict[str, Any] = {name: [row.key.get(name) for row in part.rows] for name in names}
    columns["values"] = [row.values for row in part.rows]
    write_table(path, columns | {"seconds": [part.seconds] * len(part.rows)})


def read_part(path: Path) -> Part | None:
    """What `write_part` wrote; None if there is no such file.

    Raises:
        UserError: it is no such file.
    """
    if not path.is_file():
        return None
    try:
        rows = pq.read_table(path).to_pylist()
        found = [
            Measured(
                {name: value for name, value in row.items() if name not in ("values", "seconds") and value is not None},
                np.asarray(row["values"], dtype=np.float64),
            )
            for row in rows
        ]
        return Part(found, float(rows[0]["seconds"]))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"file {path}", "it is damaged", "delete it, and run the same command again") from error


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A moment of a finetuning."""

    run: str
    """Name of the run."""
    curriculum: str
    seed: int
    step: int
    """0 for the original model."""
    tokens: int
    """Tokens that it was trained on up to then."""


MOMENT = [
    Column("run", "moment.run", whole=True),
    Column("curriculum", "moment.curriculum", spare=3),
    Column("step", "moment.step", ",d"),
    Column("tokens", "moment.tokens", ",d", spare=2),
]
"""Columns of tables with a row for each moment."""


class Series(NamedTuple):
    """One finetuning's moments in order, the original model first, with a part of each."""

    moments: Sequence[Moment]
    parts: Sequence[Part]

    @property
    def run(self) -> str:
        return self.moments[-1].run

    @property
    def is_plain(self) -> bool:
        """Whether it is the control that was finetuned on the text alone."""
        return self.moments[-1].curriculum == "plain"


def plain_series(series: Series, all_series: Sequence[Series]) -> Series | None:
    """The plain finetuning of the same seed; None if there is none beside it."""
    own = series.moments[-1]
    found = (s for s in all_series if s.is_plain and s.moments[-1].seed == own.seed and s.run != own.run)
    return next(found, None)


def plain_parts(series: Series, all_series: Sequence[Series]) -> dict[int, Part]:
    """What was measured of the plain finetuning of the same seed, by its steps; nothing if there is none."""
    plain = plain_series(series, all_series)
    return {} if plain is None else {m.step: part for m, part in zip(plain.moments, plain.parts, strict=True)}


def over_runs(found: Sequence[Interval]) -> Interval | None:
    """One number of runs of one curriculum: that of a single run with its interval over prompts, the mean of several
    with Student's interval over runs."""
    if len(found) < 2:
        return found[0] if found else None
    return student_mean([one.estimate for one in found])
