"""Results as files that a page can show by itself: the line, tables and figures of each, without the classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.runs.atomic import write_json
from trimtab.runs.config import config_dict, json_safe
from trimtab.runs.figures import svg
from trimtab.runs.results import Result
from trimtab.runs.run import Run
from trimtab.runs.tables import Cell, Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_FILE = "shown.json"
"""Name of a run's list of `Shown`."""
FEATURE_PAGES = "features"
"""Directory within a run of the run of `trimtab feature` that its page leads to."""


def feature_anchor(site: str, feature: int) -> str:
    """By which links lead to a feature on a page."""
    return f"{site}-{feature}"


@dataclass(frozen=True, kw_only=True)
class ShownColumn:
    """Head of a column, and how its numbers are written."""

    title: str
    form: str
    note: str


@dataclass(frozen=True, kw_only=True)
class ShownTable:
    """A table with its values."""

    title: str
    caption: str
    columns: tuple[ShownColumn, ...]
    rows: tuple[tuple[Any, ...], ...]
    """Words, numbers, and intervals as mappings."""

    @classmethod
    def of(cls, table: Table, title: str) -> ShownTable:
        """A table's columns and cells."""
        columns = tuple(ShownColumn(title=c.title, form=c.form, note=c.note) for c in table.columns)
        rows = tuple(tuple(json_safe(column.cell(row)) for column in table.columns) for row in table.rows)
        return cls(title=table.title or title, caption=table.caption, columns=columns, rows=rows)

    def table(self) -> Table:
        """The table again."""
        columns = [Column(c.title, _cell(i), c.form, note=c.note) for i, c in enumerate(self.columns)]
        return Table(columns=columns, rows=self.rows, title=self.title, caption=self.caption)


@dataclass(frozen=True, kw_only=True)
class ShownFigure:
    """A drawing as SVG."""

    caption: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class ShownText:
    """A text whose tokens are marked, the more of something they have."""

    label: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    """How much each token has of it; 0 is not marked."""
    largest: float
    """The value that is marked most strongly."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One result, as a section of a page."""

    title: str
    headline: str
    tables: tuple[ShownTable, ...] = ()
    figures: tuple[ShownFigure, ...] = ()
    texts: tuple[ShownText, ...] = ()
    anchor: str = ""
    """By which links lead to the section."""
    yes: bool | None = None
    """The answer, of a result that is one."""

    @classmethod
    def of(
        cls,
        title: str,
        result: Result,
        figures: Mapping[str, Callable[[Axes], None]] | None = None,
        *,
        texts: Sequence[ShownText] = (),
        anchor: str = "",
        leave_out: Sequence[str] = (),
        height: float = 3.2,
    ) -> Shown:
        """What a result shows.

        Args:
            title: of the section.
            result: the result.
            figures: drawings by their caption.
            texts: texts with marked tokens.
            anchor: by which links lead to the section.
            leave_out: names of tables that are too long for a page.
            height: of a figure, in inches.
        """
        tables = tuple(
            ShownTable.of(t, name) for name, t in result.tables().items() if name not in leave_out and t.rows
        )
        drawn = tuple(ShownFigure(caption=c, svg=svg(d, c, height=height)) for c, d in (figures or {}).items())
        return cls(
            title=title, headline=result.headline(), tables=tables, figures=drawn, texts=tuple(texts), anchor=anchor,
            yes=getattr(result, "yes", None),
        )  # fmt: skip


def write_shown(run: Run, sections: Sequence[Shown]) -> None:
    """Keep in a run the sections of its page. Raises a `UserError` if the disk refuses."""
    write_json(run.file(SHOWN_FILE), [config_dict(section) for section in sections])


def _cell(number: int) -> Callable[[Any], Cell]:
    return lambda row: row[number]
