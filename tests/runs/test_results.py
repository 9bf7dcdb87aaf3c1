"""Results in notebooks, as frames and as figures, each against the values that went in."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pytest
from matplotlib.axes import Axes
from rich.console import Console

from trimtab.errors import UserError
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, Column, Table
from trimtab.stats import Interval

ROWS = [
    {"name": "<b>a</b>", "n": 1234, "mean": Interval(estimate=0.5, low=0.25, high=0.75, n=9, method="bootstrap")},
    {"name": "two\nlines", "n": None, "mean": None},
]
COLUMNS = [Column("what it is", "name"), Column("count", "n", COUNT), Column("mean", "mean", ".2f")]


@dataclass(frozen=True, repr=False)
class Found(Result):
    """A result with two tables."""

    rows: list[dict[str, Any]]

    def headline(self) -> str:
        return f"{len(self.rows)} found & kept"

    def tables(self) -> dict[str, Table]:
        names = Table(columns=COLUMNS[:1], rows=self.rows)
        return {"all": Table(columns=COLUMNS, rows=self.rows, title="T", caption="in <units>"), "names": names}

    def draw(self, ax: Axes) -> None:
        ax.plot([1, 2], [3, 5])


class Cells(HTMLParser):
    """Texts of a table's cells, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_a_notebook_shows_every_cell_as_text() -> None:
    shown = Found(ROWS)._repr_html_()
    all_rows = [["what it is", "count", "mean"], ["<b>a</b>", "1,234", "0.50 [0.25, 0.75]"], ["two\nlines", "–", "–"]]
    names = [["what it is"], ["<b>a</b>"], ["two\nlines"]]
    assert Cells(shown).rows == all_rows + names
    assert "<b>" not in shown
    assert html.escape("T. in <units>") in shown
    assert "2 found &amp; kept" in shown


def test_a_frame_holds_values() -> None:
    frame = Found(ROWS).to_frame()
    assert list(frame.columns) == ["name", "n", "mean", "mean_low", "mean_high"]
    assert frame.loc[0].tolist() == ["<b>a</b>", 1234, 0.5, 0.25, 0.75]
    assert frame.loc[1].isna().tolist() == [False, True, True, True, True]
    assert list(Found(ROWS).to_frame("names").columns) == ["name"]
    assert list(Found([]).to_frame().columns) == ["name", "n", "mean"]
    with pytest.raises(UserError, match="Found's table 'some': there is all, names; choose one of them"):
        Found(ROWS).to_frame("some")


def test_a_marked_number_is_a_number_in_frames() -> None:
    column = Column("KL", "kl", ".2f", equal="same")
    rows = [{"kl": 1.5, "same": False}, {"kl": 2.0, "same": True}, {"kl": None, "same": None}]
    assert [column.text(row) for row in rows] == ["1.50 ≠", "2.00", "–"]
    frame = Table(columns=[column], rows=rows).to_frame()
    assert frame.kl.dtype == float
    assert frame.kl.fillna(-1).tolist() == [1.5, 2.0, -1]
    assert frame.same.tolist() == [False, True, None]


def test_a_terminal_shows_headline_and_tables() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Found(ROWS))
    text = console.export_text()
    assert text.startswith("2 found & kept")
    assert "0.50 [0.25, 0.75]" in text


def test_a_plot_is_drawn_where_it_is_asked_for() -> None:
    import matplotlib.pyplot as plt

    given = plt.figure().add_subplot()
    assert Found(ROWS).plot(given) is given
    assert given.lines[0].get_ydata().tolist() == [3, 5]  # type: ignore[union-attr]
    own = Found(ROWS).plot()
    assert own is not given
    assert own.lines[0].get_ydata().tolist() == [3, 5]  # type: ignore[union-attr]
    plt.close("all")
    with pytest.raises(UserError, match="a plot of Bare: it has no figure"):
        type("Bare", (Result,), {})().plot()
    assert plt.get_fignums() == []


def test_it_says_itself_in_one_line() -> None:
    assert repr(Found(ROWS)) == "<Found: 2 found & kept>"


def test_as_json_it_holds_plain_values_or_says_what_is_none() -> None:
    """Mutations: intervals left as they are; what has no plain form written as its text."""
    first, second = json.loads(json.dumps(Found(ROWS).to_json()))["rows"]
    assert first == {"name": "<b>a</b>", "n": 1234, "mean": ROWS[0]["mean"].to_dict()}
    assert second == ROWS[1]
    with pytest.raises(UserError, match=r"^Found as JSON: object has no plain form"):
        Found([{"model": object()}]).to_json()
