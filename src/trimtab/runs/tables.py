"""Results as tables: columns say which fields of a row they show, and here alone values become text.

A `Table` is shown by terminals, notebooks and pages, and is a frame of pandas.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from trimtab.stats import Interval, interval_of, number_text

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console, ConsoleOptions
    from rich.table import Table as RichTable

Cell = str | float | Interval | None
"""Words and texts stand as they are, numbers in their column's format, and a dash where there is none."""


@dataclass(frozen=True)
class Column:
    """What a column shows of a row, which is a mapping or an object with fields."""

    title: str
    value: str | Callable[[Any], Cell]
    """Name of a field, a field's field after a dot (`dose.relative`), or a function of the row."""
    form: str = ""
    """Format of its numbers, such as those below; empty for words, which stand on the left."""
    whole: bool = False
    """Never broken, such as sites and runs; the others give way to it, and are broken rather than cut."""
    note: str = ""
    """A unit or a remark, below the title on a page."""
    factor: float = 1.0
    """What numbers are multiplied by, such as 100 for points."""
    spare: int = 0
    """Above 0, it is left out where a terminal is too narrow, the highest number first."""
    equal: str = ""
    """Name of a field that is False where the number is marked with ≠; a column of its own in frames."""

    def cell(self, row: Any) -> Cell:
        """The value in a row; an interval that lies in JSON is made one again."""
        found = self.value(row) if callable(self.value) else _field(row, self.value)
        found = interval_of(cast("dict[str, Any]", found)) if isinstance(found, Mapping) else found
        if self.factor == 1 or found is None or isinstance(found, str):
            return found
        return found.scaled(self.factor) if isinstance(found, Interval) else found * self.factor

    def text(self, row: Any) -> str:
        """The same as text."""
        cell = self.cell(row)
        text = cell if isinstance(cell, str) else number_text(cell, self.form)
        return f"{text} ≠" if self.equal and _field(row, self.equal) is False else text

    @property
    def name(self) -> str:
        """What a frame calls it: the field, or else the title."""
        return self.title if callable(self.value) else self.value.replace(".", "_")


def _field(row: Any, path: str) -> Any:
    found = row
    for name in path.split("."):
        if found is not None:
            mapping = isinstance(found, Mapping)
            found = cast("Mapping[str, Any]", found).get(name) if mapping else getattr(found, name)
    return found


COUNT, NUMBER, SHARE, INTERVAL, SIGNED = ",d", ".3g", ".1%", ".3f", "+.3f"
"""Formats of most columns; an interval has its bounds beside it in the same format."""
MOST_NAMED = 4
"""As many names a line lists."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows and what is shown of them; on pages the first column names the row."""

    columns: Sequence[Column]
    rows: Sequence[Any]
    caption: str = ""
    title: str = ""
    emphasis: Any = None
    """A row to set off."""
    group: Callable[[Any], str] | None = None
    """Rows that follow each other and share this text stand below it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        yield self.fitting(options.max_width)

    def fitting(self, width: int) -> RichTable:
        """The table for a terminal of so many characters.

        Where words and numbers would be broken, intervals stand below their estimates, and spare columns are left out.
        """
        columns, caption = list(self.columns), self.caption
        narrow = self._least_width(columns, narrow=False) > width
        while narrow and self._least_width(columns, narrow=True) > width:
            last = max(columns, key=lambda column: column.spare)
            if not last.spare:
                break
            columns.remove(last)
        if len(columns) < len(self.columns):
            left_out = ", ".join(column.title for column in self.columns if column not in columns)
            caption = f"{caption} Too wide for here, but in JSON and frames: {left_out}.".lstrip()
        return result_table(columns, self.rows, title=self.title, caption=caption, narrow=narrow)

    def _least_width(self, columns: Sequence[Column], *, narrow: bool) -> int:
        """Characters that columns take with all lines between them, broken between words, or as if narrow."""
        widths = [max(map(len, _unbroken(column, self.rows, narrow)), default=0) for column in columns]
        return sum(widths) + 3 * len(widths) + 1

    def _repr_html_(self) -> str:
        """The table as a notebook shows it."""
        styles = [f"text-align:{'right' if column.form else 'left; white-space:pre-wrap'}" for column in self.columns]
        heads = (column.title for column in self.columns)
        texts = ((column.text(row) for column in self.columns) for row in self.rows)
        lines = [_html_row("th", heads, styles), *(_html_row("td", row, styles) for row in texts)]
        about = [part for part in (self.title, self.caption) if part]
        said = f"<caption>{html.escape('. '.join(about))}</caption>" if about else ""
        return f"<table>{said}{''.join(lines)}</table>"

    def to_frame(self) -> pd.DataFrame:
        """The values under their fields' names; an interval has three columns, its bounds as `_low` and `_high`."""
        import pandas as pd

        names = None if self.rows else [column.name for column in self.columns]
        return pd.DataFrame([self._values(row) for row in self.rows], columns=names)

    def _values(self, row: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for column in self.columns:
            cell = column.cell(row)
            found[column.name] = cell.estimate if isinstance(cell, Interval) else cell
            if isinstance(cell, Interval):
                found |= {f"{column.name}_low": cell.low, f"{column.name}_high": cell.high}
            if column.equal:
                found[column.equal] = _field(row, column.equal)
        return found


def _html_row(tag: str, texts: Iterable[str], styles: Sequence[str]) -> str:
    cells = (f'<{tag} style="{style}">{html.escape(text)}</{tag}>' for text, style in zip(texts, styles, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _unbroken(column: Column, rows: Iterable[Any], narrow: bool) -> Iterator[str]:
    """Parts of a column's title and cells that stand on one line each."""
    yield from [column.title] if column.whole else column.title.split()
    for text in map(column.text, rows):
        if column.whole:
            yield text
        else:
            yield from _stacked(text).split("\n") if narrow and column.form else text.split()


def _stacked(text: str) -> str:
    """A number with its interval below it."""
    return text.replace(" [", "\n[")


def result_table(
    columns: Sequence[Column],
    rows: Iterable[Any],
    *,
    title: str = "",
    caption: str = "",
    framed: bool = True,
    narrow: bool = False,
) -> RichTable:
    """A table for the terminal that loses nothing where it is narrow.

    Args:
        columns: what to show of each row, in order.
        rows: mappings, or objects with fields.
        title: above it.
        caption: below it.
        framed: with lines around and between.
        narrow: intervals stand below their estimates.
    """
    from rich.markup import escape
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=escape(title) or None, caption=escape(caption) or None)
    if not framed:
        table.box, table.pad_edge = None, False
    for column in columns:
        justify = "right" if column.form else "left"
        table.add_column(Text(column.title), justify=justify, overflow="fold", no_wrap=column.whole)
    for row in rows:
        texts = (column.text(row) for column in columns)
        table.add_row(*(Text(_stacked(text) if narrow else text) for text in texts))
    return table


def text_table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """The same as plain text, as wide as it is."""
    lines = _texts(columns, rows)
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    aligned = (
        map(lambda column, text, width: text.rjust(width) if column.form else text.ljust(width), columns, line, widths)
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def markdown_table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """The same as a table of Markdown, numbers on the right."""
    heads, *lines = ([text.replace("|", "\\|") for text in texts] for texts in _texts(columns, rows))
    rule = ["---:" if column.form else "---" for column in columns]
    return "\n".join(f"| {' | '.join(texts)} |" for texts in (heads, rule, *lines))


def in_short(names: Sequence[str], what: str) -> str:
    """Names as a list, or of more than `MOST_NAMED` how many there are, the first and the last.

    Args:
        names: in order.
        what: what they name, in the plural.
    """
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} {what} from {names[0]} to {names[-1]}"


def _texts(columns: Sequence[Column], rows: Iterable[Any]) -> list[list[str]]:
    """Titles, and each row's cells."""
    return [[column.title for column in columns], *([column.text(row) for column in columns] for row in rows)]


def flat_row(result: Any) -> dict[str, Any]:
    """A dataclass as a row of a file: an interval in three columns, null where there is none; tuples are left out."""
    row: dict[str, Any] = {}
    for field in fields(result):
        name, value = field.name, getattr(result, field.name)
        if "Interval" in str(field.type):
            ends = (None, None, None) if value is None else (value.estimate, value.low, value.high)
            row |= zip((name, f"{name}_low", f"{name}_high"), ends, strict=True)
        elif not isinstance(value, tuple):
            row[name] = value
    return row


def named_values(values: Mapping[str, object]) -> str:
    """One line for each value, behind its name."""
    width = max(14, *map(len, values))
    return "\n".join(f"{name:{width}} {value}" for name, value in values.items())
