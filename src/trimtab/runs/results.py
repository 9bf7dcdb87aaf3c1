"""What results have in common: a line and tables in terminal and notebook, frames of pandas, a figure."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trimtab.errors import UserError, named
from trimtab.runs.config import json_safe
from trimtab.runs.figures import own_axis
from trimtab.runs.tables import Table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from rich.console import RenderableType


class Result:
    """A result says itself in a line (`headline`) and in named tables; one that has a figure draws it in `draw`."""

    def headline(self) -> str:
        """One line that says what it is."""
        raise NotImplementedError

    def tables(self) -> Mapping[str, Table]:
        """What it holds, the main table first."""
        return {}

    def draw(self, ax: Axes) -> None:
        """Draw the figure that pages show, too."""
        raise UserError(f"a plot of {type(self).__name__}", "it has no figure", "plot its frame")

    def render(self) -> RenderableType:
        """For the terminal."""
        from rich.console import Group
        from rich.text import Text

        return Group(Text(self.headline()), *self.tables().values())

    def __rich__(self) -> RenderableType:
        return self.render()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.headline()}>"

    def _repr_html_(self) -> str:
        tables = "".join(table._repr_html_() for table in self.tables().values())  # pyright: ignore[reportPrivateUsage]
        return f"<p>{html.escape(self.headline())}</p>{tables}"

    def to_json(self) -> dict[str, Any]:
        """All that it holds as plain values, intervals as mappings.

        Raises:
            UserError: it holds what has no plain form, such as a model.
        """
        try:
            return json_safe(self)
        except TypeError as error:
            why = str(error).partition(":")[0]
            raise UserError(f"{type(self).__name__} as JSON", why, "take frames of its tables") from error

    def to_frame(self, table: str = "") -> pd.DataFrame:
        """One of the tables as a frame of pandas, with values instead of texts.

        Args:
            table: its name; the main one by default.

        Raises:
            UserError: there is no such table.
        """
        tables = self.tables()
        return named(tables, table or next(iter(tables), ""), f"{type(self).__name__}'s table").to_frame()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the result.

        Args:
            ax: where to; a new figure by default.

        Raises:
            UserError: it has no figure.
        """
        return own_axis(self.draw, ax)
