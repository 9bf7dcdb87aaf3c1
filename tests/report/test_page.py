"""The page builder: what it writes is well-formed, escaped and self-contained."""

from __future__ import annotations

import itertools
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from trimtab.report.drawing import Mark, interval_plot, nice_ticks, rank_curve
from trimtab.report.page import Column, Page, callout, details, escape, facts, figure, number, paragraph, table
from trimtab.stats import Interval

EVIL = "</style><script>alert(1)</script> & \"quoted\" <img src='http://x.example/y'>"
VALUE = Interval(estimate=-0.25, low=-0.5, high=0.125, n=7)
VOID = {"meta", "line", "circle", "polyline", "img", "br"}


class Outline(HTMLParser):
    """Tags in order; fails on one that is closed without having been opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def outline(text: str) -> Outline:
    found = Outline()
    found.feed(text)
    assert found.open == []
    return found


@pytest.fixture
def page() -> Page:
    page = Page(EVIL, EVIL)
    page.add(callout(EVIL, good=True))
    page.section(
        EVIL,
        paragraph(EVIL),
        facts([(EVIL, EVIL)]),
        table([Column(EVIL, EVIL, numeric=False), Column("b")], [[escape(EVIL), number(VALUE)]], EVIL, emphasis=0),
        figure(interval_plot([Mark(EVIL, VALUE, (0.1,))], EVIL, EVIL), EVIL),
        figure(rank_curve([0, 1, 2], [3.0, 1.0, -2.0], [(1, 1.0, EVIL)], EVIL, EVIL), EVIL),
        details(EVIL, paragraph(EVIL)),
    )
    return page


def test_nothing_that_was_given_becomes_markup(page: Page):
    found = outline(page.render())
    assert "script" not in {tag for tag, _ in found.tags}
    assert "img" not in {tag for tag, _ in found.tags}
    assert EVIL in found.words  # it is there, as text


def test_page_needs_nothing_but_itself(page: Page):
    for tag, attributes in outline(page.render()).tags:
        assert tag not in {"link", "script", "iframe", "object"}
        assert not {"src", "href", "srcset", "onclick", "onload"} & set(attributes)
    assert "url(" not in page.render()
    assert "@import" not in page.render()


def test_tables_and_figures_can_be_read_aloud(page: Page):
    found = outline(page.render())
    headings = [attributes["scope"] for tag, attributes in found.tags if tag == "th"]
    assert headings == ["col", "col", "row"]
    assert any(tag == "caption" for tag, _ in found.tags)
    drawings = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert len(drawings) == 2
    assert all(attributes["role"] == "img" and attributes["aria-label"] == EVIL for attributes in drawings)
    assert found.tags[0][1] == {"lang": "en"}


def test_numbers_carry_their_interval():
    assert "".join(outline(number(VALUE, 1, 100)).words) == "−25.0 [−50.0, 12.5]"
    assert "".join(outline(number(VALUE, 2, signed=True)).words) == "−0.25 [−0.50, +0.12]"
    assert "".join(outline(number(None)).words) == "–"
    alone = Interval(estimate=1.0, low=float("nan"), high=float("nan"), n=1)
    assert "".join(outline(number(alone, 0)).words) == "1"


def test_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        table([Column("a"), Column("b")], [[escape("only one")]])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 12.7), (-5, -1), (0, 0), (1e-6, 3e-6), (-2000, 5120)])
def test_ticks_cover_the_range_in_even_round_steps(low: float, high: float):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert steps
    assert all(step == pytest.approx(steps[0]) and step > 0 for step in steps)
    assert len(ticks) <= 10


def test_torch_stays_unloaded():
    code = "import sys, trimtab.report; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
