"""Tables for the terminal that lose nothing where it is narrow."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.table import Table


def add_columns(table: Table, names: Sequence[str], *, words: Collection[str], whole: Collection[str] = ()) -> None:
    """Add columns, which are numbers unless said otherwise.

    Args:
        table: gets the columns.
        names: their titles, in order.
        words: those with words, on the left.
        whole: those that are never broken, such as sites and runs; the others give way to them, and are broken rather
            than cut.
    """
    for name in names:
        table.add_column(
            name, justify="left" if name in words else "right", overflow="fold", no_wrap=name in whole
        )  # fmt: skip
