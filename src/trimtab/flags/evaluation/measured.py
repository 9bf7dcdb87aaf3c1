"""What an evaluation measures of one model: numbers of each example under a key, kept as a table.

Intervals are computed from these alone, so that what is read back from a run is compared as if it were measured now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.runs import write_table
from trimtab.runs.figures import Curve
from trimtab.runs.tables import SIGNED, Column
from trimtab.stats import Interval, Resampled, student_mean


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
    last_phase: bool = True
    """Whether forced share and λ are, from here on, those of the end."""


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
    plain: Mapping[int, Part]
    """The same of the plain finetuning that it is compared with, by step; empty where there is none."""

    @property
    def run(self) -> str:
        return self.moments[-1].run


@dataclass(frozen=True, kw_only=True)
class MomentRow:
    """A row of a result: one moment, and how its number compares."""

    moment: Moment
    change: Interval | None
    """Since step 0; None there."""
    beyond_plain: Interval | None
    """Above that of the plain finetuning at the same step; None at step 0, and where there is none."""


CHANGES = [
    Column("since step 0", "change", SIGNED, spare=1),
    Column("beyond plain", "beyond_plain", SIGNED, note="equal steps"),
]
"""Columns of a `MomentRow`."""


class Compared(NamedTuple):
    """One number of one moment beside what it is compared with."""

    moment: Moment
    part: Part
    key: Any
    """Which number."""
    value: Resampled
    first: Resampled | None
    """At step 0; None there."""
    plain: Resampled | None
    """Of the plain finetuning at the same step; None at step 0, and where there is none."""

    @property
    def fields(self) -> dict[str, Any]:
        """Those of a `MomentRow`."""
        change, beyond = (None if each is None else (self.value - each).interval for each in (self.first, self.plain))
        return {"moment": self.moment, "change": change, "beyond_plain": beyond}


def compared(series: Sequence[Series], of: Callable[[Part], Mapping[Any, Resampled]]) -> Iterator[Compared]:
    """Every number of every moment beside the original's and that of the plain finetuning at the same step.

    Args:
        series: of each run.
        of: the numbers of a part.
    """
    parts = {id(part): part for one in series for part in (*one.parts, *one.plain.values())}
    known = {id_: of(part) for id_, part in parts.items()}
    for one in series:
        for moment, part in zip(one.moments, one.parts, strict=True):
            first, plain = (one.parts[0], one.plain.get(moment.step)) if moment.step else (None, None)
            others = [{} if other is None else known[id(other)] for other in (first, plain)]
            for key, value in known[id(part)].items():
                yield Compared(moment, part, key, value, *(other.get(key) for other in others))


def curves(rows: Iterable[Any], value: str, label: str = "{moment.run}", x: str = "moment.step") -> list[Curve]:
    """Estimates of an interval of rows, a curve for each label.

    Args:
        rows: of a result.
        value: name of the interval.
        label: a format of a row's fields.
        x: field that the curves are over.
    """
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(label.format(**vars(row)), []).append(row)
    place = attrgetter(x)
    return [Curve(name, [*map(place, of)], [getattr(row, value).estimate for row in of]) for name, of in found.items()]


def over_runs(found: Sequence[Interval]) -> Interval:
    """One number of runs of one curriculum: that of a single run with its interval over examples, the mean of several
    with Student's interval over runs."""
    return found[0] if len(found) == 1 else student_mean([one.estimate for one in found])
