"""The page builder: what it writes is well-formed, escaped and self-contained."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from outline import Outline

from trimtab.report.drawing import Mark, interval_plot, nice_ticks, rank_curve
from trimtab.report.page import Column, Page, callout, details, escape, facts, figure, number, paragraph, table
from trimtab.stats import Interval

EVIL = "</style><script>alert(1)</script> & \"quoted\" <img src='http://x.example/y'>"
VALUE = Interval(estimate=-0.25, low=-0.5, high=0.125, n=7)


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
    found = Outline(page.render())
    assert "script" not in {tag for tag, _ in found.tags}
    assert "img" not in {tag for tag, _ in found.tags}
    assert EVIL in found.words  # it is there, as text


def test_page_needs_nothing_but_itself(page: Page):
    for tag, attributes in Outline(page.render()).tags:
        assert tag not in {"link", "script", "iframe", "object"}
        assert not {"src", "href", "srcset", "onclick", "onload"} & set(attributes)
    assert "url(" not in page.render()
    assert "@import" not in page.render()


def test_tables_and_figures_can_be_read_aloud(page: Page):
    found = Outline(page.render())
    headings = [attributes["scope"] for tag, attributes in found.tags if tag == "th"]
    assert headings == ["col", "col", "row"]
    assert any(tag == "caption" for tag, _ in found.tags)
    drawings = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert len(drawings) == 2
    assert all(attributes["role"] == "img" and attributes["aria-label"] == EVIL for attributes in drawings)
    assert found.tags[0][1] == {"lang": "en"}


def test_numbers_carry_their_interval():
    assert Outline(number(VALUE, 1, 100)).words == "−25.0 [−50.0, 12.5]"
    assert Outline(number(VALUE, 2, signed=True)).words == "−0.25 [−0.50, +0.12]"
    assert Outline(number(None)).words == "–"
    alone = Interval(estimate=1.0, low=float("nan"), high=float("nan"), n=1)
    assert Outline(number(alone, 0)).words == "1"


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
