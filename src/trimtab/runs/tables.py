"""Results as tables: columns say what they hold, rows hold values, and here alone values become text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from trimtab.stats import Interval, number_text

if TYPE_CHECKING:
    from rich.table import Table

Cell = str | float | Interval | None
"""Words and texts stand as they are, numbers in their column's format, and a dash where there is none."""


class Column(NamedTuple):
    """What a column holds."""

    title: str
    form: str = ""
    """Format of its numbers, such as those below; empty for words, which stand on the left."""
    whole: bool = False
    """Never broken, such as sites and runs; the others give way to it, and are broken rather than cut."""


COUNT, NUMBER, SHARE, INTERVAL, SIGNED = ",d", ".3g", ".1%", ".3f", "+.3f"
"""Formats of most columns; an interval has its bounds beside it in the same format."""


def result_table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[Cell]],
    *,
    title: str = "",
    caption: str = "",
    framed: bool = True,
) -> Table:
    """A table for the terminal that loses nothing where it is narrow.

    Args:
        columns: what the rows hold, in order.
        rows: a value for each column.
        title: above it.
        caption: below it.
        framed: with lines around and between.
    """
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(title=escape(title) or None, caption=escape(caption) or None)
    if not framed:
        table.box, table.pad_edge = None, False
    for column in columns:
        justify = "right" if column.form else "left"
        table.add_column(Text(column.title), justify=justify, overflow="fold", no_wrap=column.whole)
    for row in rows:
        table.add_row(*(Text(text) for text in _texts(columns, row)))
    return table


def text_table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], *, indent: str = "") -> str:
    """The same as plain text, as wide as it is."""
    lines = [[column.title for column in columns], *(_texts(columns, row) for row in rows)]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    aligned = (
        map(lambda column, text, width: text.rjust(width) if column.form else text.ljust(width), columns, line, widths)
        for line in lines
    )
    return "\n".join(f"{indent}{'  '.join(line)}".rstrip() for line in aligned)


def named_values(values: Mapping[str, object]) -> str:
    """One line for each value, behind its name."""
    return "\n".join(f"{name:14} {value}" for name, value in values.items())


def _texts(columns: Sequence[Column], row: Sequence[Cell]) -> list[str]:
    return [
        cell if isinstance(cell, str) else number_text(cell, column.form)
        for column, cell in zip(columns, row, strict=True)
    ]
