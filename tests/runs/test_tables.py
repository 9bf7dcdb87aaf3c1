"""Tables of results: values become text in one way, and nothing is lost where the terminal is narrow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from trimtab.runs.tables import (
    COUNT,
    INTERVAL,
    NUMBER,
    SHARE,
    SIGNED,
    Column,
    markdown_table,
    result_table,
    text_table,
)
from trimtab.runs.tables import Table as ResultTable
from trimtab.stats import Interval, number_text

COLUMNS = [
    Column("site", "site", whole=True),
    Column("reward", "reward", INTERVAL),
    Column("gain", "gain", SIGNED),
    Column("KL", "kl", NUMBER),
    Column("share", lambda row: row["share"], SHARE),
    Column("edits", "dose.edits", COUNT),
]


@dataclass(frozen=True)
class Dose:
    edits: int


ROWS: list[dict[str, Any]] = [
    {
        "site": "resid_post.15", "reward": Interval(estimate=0.4222, low=0.3141, high=0.53, n=24), "gain": -0.25,
        "kl": 0.012345, "share": 0.5, "dose": Dose(12345),
    },
    {
        "site": "[bold]2[/bold]", "reward": Interval(estimate=1, low=math.nan, high=math.nan, n=1).to_dict(),
        "gain": None, "kl": math.nan, "share": "3/8", "dose": None,
    },
]  # fmt: skip
TEXT = """\
site                          reward    gain      KL  share   edits
resid_post.15   0.422 [0.314, 0.530]  -0.250  0.0123  50.0%  12,345
[bold]2[/bold]                 1.000       –       –    3/8       –"""


MARKDOWN = """\
| site | reward | gain | KL | share | edits |
| --- | ---: | ---: | ---: | ---: | ---: |
| resid_post.15 | 0.422 [0.314, 0.530] | -0.250 | 0.0123 | 50.0% | 12,345 |
| a\\|b | 1.000 | – | – | 3/8 | – |"""


def shown(table: Table | ResultTable, width: int) -> str:
    console = Console(width=width, file=StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_a_number_is_written_in_one_way() -> None:
    interval = Interval(estimate=0.4222, low=0.3141, high=0.53, n=24)
    assert number_text(interval, "+.3f") == "+0.422 [+0.314, +0.530]"
    assert number_text(Interval(estimate=1.0, low=math.nan, high=math.nan, n=1), ".2f") == "1.00"
    assert number_text(interval.scaled(100), ".1f") == "42.2 [31.4, 53.0]"
    assert [number_text(value, ".3g") for value in (None, math.nan, 0.0, 12345)] == ["–", "–", "0", "1.23e+04"]
    assert interval.bounds(".1%") == "[31.4%, 53.0%]"


def test_what_a_format_cannot_hold_says_what_it_is() -> None:
    assert [number_text(value, COUNT) for value in (12345.0, 0.5, 1234.25)] == ["12,345", "0.5", "1,234.25"]
    forms = (COUNT, NUMBER, SHARE)
    assert [number_text(value, form) for value in (math.inf, -math.inf) for form in forms] == ["∞"] * 3 + ["−∞"] * 3
    assert number_text(math.inf, SIGNED) == "+∞"
    assert number_text(Interval(estimate=2.5, low=1, high=math.inf, n=9), COUNT) == "2.5 [1, ∞]"


def test_words_stand_on_the_left_and_numbers_on_the_right_in_their_column_s_format() -> None:
    assert text_table(COLUMNS, ROWS) == TEXT
    lines = shown(result_table(COLUMNS, ROWS, framed=False), 120).splitlines()
    assert [line.rstrip() for line in lines] == TEXT.splitlines()


def test_markdown_has_the_same_cells_and_no_cell_ends_early() -> None:
    assert markdown_table(COLUMNS, [ROWS[0], ROWS[1] | {"site": "a|b"}]) == MARKDOWN


def check_narrow() -> None:
    text = shown(result_table(COLUMNS, ROWS, title="a [b]", caption="c"), 64)
    assert "a [b]" in text
    assert "resid_post.15" in text
    assert "…" not in text
    cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]
    assert "".join(row[1] for row in cells[:-1]).replace(" ", "").startswith("0.422[0.314,0.530]")
    assert "12,345" in "".join(row[5] for row in cells)


def test_a_narrow_terminal_breaks_numbers_and_never_cuts_them() -> None:
    check_narrow()


@pytest.mark.parametrize("mutation", [{"overflow": "ellipsis", "no_wrap": True}, {"no_wrap": False}])
def test_a_table_that_cuts_or_breaks_a_site_is_caught(
    mutation: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations: numbers that do not fit end in dots; sites are broken like the rest."""
    add_column = Table.add_column
    monkeypatch.setattr(Table, "add_column", lambda self, title, **how: add_column(self, title, **{**how, **mutation}))
    with pytest.raises(AssertionError):
        check_narrow()


def test_a_narrow_terminal_leaves_out_what_is_spare_and_says_so() -> None:
    """Numbers stay whole: intervals go below their estimates, and what is lost is named."""
    columns = [
        *COLUMNS[:2],
        Column("a much longer title", "gain", SIGNED, spare=2),
        Column("effect", "kl", NUMBER, spare=1),
        Column("edits", "dose.edits", COUNT, spare=3),
    ]
    table = ResultTable(columns=columns, rows=ROWS, caption="Said.")
    wide, narrow, narrowest = (shown(table, width) for width in (90, 50, 30))
    assert "0.422 [0.314, 0.530]" in wide
    assert "Too wide" not in wide
    lines = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in narrow.splitlines() if "│" in line]
    assert lines[:2] == [["resid_post.15", "0.422", "0.0123"], ["", "[0.314, 0.530]", ""]]
    said = " ".join(narrow.split())
    assert "Said. Too wide for here, but in JSON and frames: a much longer title, edits." in said
    assert all(len(line) <= 50 for line in narrow.splitlines())
    assert "resid_post.15" in narrowest  # what is not spare stays, however narrow
    assert "0.422" in narrowest
    assert "edits" in shown(ResultTable(columns=[Column("", "site"), COLUMNS[-1]], rows=[]), 40)
