"""Figures: the same bytes every time, texts that can be read, and numbers that cover nothing."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from functools import partial
from itertools import pairwise

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trimtab.runs import figures
from trimtab.runs.figures import Curve, Level, Mark, plot_curves, plot_intervals, svg
from trimtab.stats import Interval

SVG = "{http://www.w3.org/2000/svg}"


def interval(estimate: float, half: float) -> Interval:
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half, n=30)


MARKS = [
    Mark("unsteered", interval(0.2, 0.03), "at its own strength", strong=True),
    Mark("static <b>", interval(0.05, 0.5), "at its own strength", points=(0.01, -0.1)),
    Mark("lora", interval(-0.1, 0.03), "at equal KL"),
]
CURVES = [Curve("policy", [0, 1, 2], [0.1, 0.5, 0.3]), Curve("critic", [0, 2], [0.2, 0.4])]
LEVELS = [Level("static", 0.3), Level("readout", 0.301), Level("ceiling", 0.9)]


def texts(drawing: str) -> list[str]:
    return ["".join(found.itertext()) for found in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


def test_a_drawing_is_the_same_bytes_every_time_with_its_words_as_words() -> None:
    draw = partial(plot_intervals, marks=MARKS, axis="reward, policy − arm")
    first, again = (svg(draw, 'who & <what> "said"') for _ in range(2))
    assert first == again
    words = texts(first)
    for said in ("at its own strength", "static <b>", "at equal KL", "reward, policy − arm", "+0.200 [+0.170, +0.230]"):
        assert words.count(said) == 1
    assert "−0.100 [−0.130, −0.070]" in words
    root = ElementTree.fromstring(first)
    assert root.get("aria-label") == 'who & <what> "said"'
    assert root.get("width") is None


def test_bytes_that_change_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: names inside a drawing are drawn at random, as matplotlib does by itself."""
    monkeypatch.setitem(figures._STYLE, "svg.hashsalt", None)
    draw = partial(plot_intervals, marks=MARKS, axis="reward")
    assert svg(draw, "t") != svg(draw, "t")


def check_numbers_cover_nothing() -> None:
    ax = Figure(layout="constrained").add_subplot()
    plot_intervals(ax, MARKS, "difference")
    ax.figure.draw_without_rendering()  # pyright: ignore[reportAttributeAccessIssue]
    (numbers,) = ax.child_axes
    frame = ax.get_window_extent()
    assert "+0.200 [+0.170, +0.230]" in [label.get_text() for label in numbers.get_yticklabels()]
    assert all(label.get_window_extent().x0 >= frame.x1 for label in numbers.get_yticklabels())
    for line in ax.lines[1:]:
        assert frame.x0 <= line.get_window_extent().x0 < line.get_window_extent().x1 <= frame.x1


def test_numbers_stand_outside_the_frame_that_holds_all_whiskers() -> None:
    check_numbers_cover_nothing()


def test_numbers_over_whiskers_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the numbers hang to the left of the frame's right edge."""
    original = Axes.secondary_yaxis
    monkeypatch.setattr(Axes, "secondary_yaxis", lambda self, _: original(self, 0.5))
    with pytest.raises(AssertionError):
        check_numbers_cover_nothing()


def test_curves_are_drawn_where_their_values_are_and_levels_are_named_apart() -> None:
    ax = Figure(layout="constrained").add_subplot()
    plot_curves(ax, CURVES, "reward", levels=LEVELS)
    assert [list(zip(*line.get_data(), strict=True)) for line in ax.lines[:2]] == [
        [(0, 0.1), (1, 0.5), (2, 0.3)], [(0, 0.2), (2, 0.4)],
    ]  # fmt: skip
    assert [line.get_ydata()[0] for line in ax.lines[2:]] == [level.value for level in LEVELS]  # pyright: ignore[reportIndexIssue]
    ax.figure.draw_without_rendering()  # pyright: ignore[reportAttributeAccessIssue]
    (names,) = ax.child_axes
    labels = names.get_yticklabels()
    assert [label.get_text() for label in labels] == ["static 0.300", "readout 0.301", "ceiling 0.900"]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(below.overlaps(above) for below, above in pairwise(boxes))
    assert texts(svg(partial(plot_curves, curves=CURVES[:1], axis="x"), "one")).count("policy") == 0  # no legend
