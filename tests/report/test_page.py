"""The page builder: what it writes is well-formed, escaped and self-contained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from outline import Outline

from trimtab.errors import UserError
from trimtab.report import page as pages
from trimtab.report import write_report
from trimtab.report.page import cell, figure, number, render, tokens
from trimtab.runs import Run, write_json
from trimtab.runs.figures import Mark, plot_intervals
from trimtab.runs.shown import SHOWN_FILE
from trimtab.runs.tables import Column, Table
from trimtab.stats import Interval

EVIL = "</style><script>alert(1)</script> & \"quoted\" <img src='http://x.example/y'>"
VALUE = Interval(estimate=-0.25, low=-0.5, high=0.125, n=7)
PAGE = """
{% extends "page.html" %}
{% from "parts.html" import absent, facts, figure, more, notes, table, verdict %}
{% block content %}
{{ verdict(evil, true) }}{{ absent(evil, evil) }}{{ facts([(evil, evil)]) }}{{ notes(evil, [evil]) }}
{{ table(rows) }}{{ figure(drawn) }}{% call more(evil) %}{{ evil }}{{ table(none) }}{% endcall %}
{% endblock %}
"""


def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A page with every part, all its texts hostile."""
    for template in pages.TEMPLATES.iterdir():
        (tmp_path / template.name).write_text(template.read_text())
    (tmp_path / "all.html").write_text(PAGE)
    monkeypatch.setattr(pages, "TEMPLATES", tmp_path)
    pages._environment.cache_clear()
    columns = [
        Column(EVIL, "a", note=EVIL),
        Column("b", "b", ".2f"),
        Column("c", lambda row: tokens([row["a"], "\n"])),
    ]
    row: dict[str, Any] = {"a": EVIL, "b": VALUE}
    values = {
        "rows": Table(columns=columns, rows=[row], caption=EVIL, emphasis=row, group=lambda row: row["a"]),
        "drawn": figure(plot_intervals, EVIL, EVIL, marks=[Mark(EVIL, VALUE, EVIL, (0.1,))], axis=EVIL),
    }
    found = render("all", title=EVIL, lead=EVIL, evil=EVIL, none=Table(columns=columns, rows=[]), **values)
    pages._environment.cache_clear()
    return found


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return write(tmp_path, monkeypatch)


def check_escaped(page: str) -> None:
    found = Outline(page)
    assert not {"script", "img"} & {tag for tag, _ in found.tags}
    assert found.words.count(" ".join(EVIL.split())) >= 16  # it is there, as text


def test_nothing_that_was_given_becomes_markup(written: str) -> None:
    check_escaped(written)


def test_texts_that_are_not_escaped_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: templates do not escape."""
    made = pages.Environment
    monkeypatch.setattr(pages, "Environment", lambda **how: made(**{**how, "autoescape": False}))
    with pytest.raises(AssertionError):
        check_escaped(write(tmp_path, monkeypatch))


def test_a_page_needs_nothing_but_itself(written: str) -> None:
    for tag, attributes in Outline(written).tags:
        assert tag not in {"link", "script", "iframe", "object"}
        assert not {"src", "srcset", "onclick", "onload"} & set(attributes)
        assert all(str(value).startswith("#") for name, value in attributes.items() if name.endswith("href"))
    assert "@import" not in written
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in written


def test_tables_and_figures_can_be_read_aloud(written: str) -> None:
    found = Outline(written)
    headings = [attributes["scope"] for tag, attributes in found.tags if tag == "th"]
    assert headings == ["col", "col", "col", "rowgroup", "row"]
    (drawing,) = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert (drawing["role"], drawing["aria-label"]) == ("img", EVIL)
    assert ("html", {"lang": "en"}) in found.tags
    assert [attributes.get("class") for tag, attributes in found.tags if tag == "tr"] == [None, "group", "emphasis"]
    assert "<tbody></tbody>" not in written  # a table without rows is left out


def test_numbers_carry_their_interval() -> None:
    row = {"v": VALUE, "json": VALUE.to_dict(), "none": None, "word": "3/8", "count": 12345}
    found = [
        cell(Column("", name, form, factor=factor), row)
        for name, form, factor in (
            ("v", ".1f", 100), ("json", "+.2f", 1), ("none", ".2f", 100), ("word", ".2f", 1), ("count", ",d", 1),
        )
    ]  # fmt: skip
    words = ["−25.0 [−50.0, 12.5]", "−0.25 [−0.50, +0.12]", "–", "3/8", "12,345"]
    assert [Outline(one).words for one in found] == words
    assert number(VALUE.to_dict()) == "−0.250 [−0.500, 0.125]"
    assert (
        Outline(cell(Column("", "v", ".0f"), {"v": Interval(estimate=1, low=float("nan"), high=1, n=1)})).words == "1"
    )


def test_what_a_template_lacks_is_an_error() -> None:
    with pytest.raises(Exception, match="'files' is undefined"):
        render("steer", title="t")


def test_torch_stays_unloaded() -> None:
    code = "import sys, trimtab.report; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_titles_name_what_a_run_found(tmp_path: Path) -> None:
    """Mutations: a title that formats what it was given once more, or without the results."""
    with Run.open(tmp_path / "run", "autointerp", {"model": "asked for"}) as run:
        write_json(run.file(SHOWN_FILE), [])
        with pytest.raises(UserError, match="has not finished"):
            write_report(run.path)
        run.finish({"judge": "{model}", "model": "tiny"})
    page = write_report(run.path).read_text("utf-8")
    assert "<h1>Where features fire, told by {model}: tiny</h1>" in page
