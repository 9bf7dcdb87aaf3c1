"""Curves over steps, with horizontal lines to read them against."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from trimtab.report.drawing import FONT, WIDTH, circle, line, nice_ticks, plain, svg, text
from trimtab.report.page import Html, escape, tag
from trimtab.report.style import ACCENT, INK, MUTED, RULE

COLOURS = (ACCENT, "#b3661a", "#4a5560", "#7a4fa3", "#1f8a4c")
MOST_POINTS = 300
"""Points of a curve that are drawn; of more, evenly spaced ones, the last included."""
FEW = 40
"""Curves with at most as many points show them as dots."""


class Curve(NamedTuple):
    """Values at steps."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]


class Level(NamedTuple):
    """A horizontal line."""

    label: str
    value: float


def curve_plot(
    curves: Sequence[Curve],
    axis: str,
    title: str,
    *,
    levels: Sequence[Level] = (),
    steps: str = "iteration",
    height: float = 260.0,
) -> Html:
    """Curves with a legend, levels dashed and named at the right.

    Args:
        curves: at least one point in all.
        axis: what the vertical axis measures.
        title: read out in place of the drawing.
        levels: horizontal lines.
        steps: what the horizontal axis counts.
        height: of the drawing's frame.
    """
    longest = max((len(f"{level.label} {level.value:.3f}") for level in levels), default=0)
    left, right, top = 70.0, 20.0 + 7.2 * longest, 34.0 if len(curves) > 1 else 14.0
    bottom = top + height
    values = [v for c in curves for v in c.values] + [level.value for level in levels]
    places = [s for c in curves for s in c.steps]
    ticks, columns = nice_ticks(min(values), max(values)), nice_ticks(min(places), max(places))

    def x(step: float) -> float:
        return left + (step - columns[0]) / (columns[-1] - columns[0]) * (WIDTH - left - right)

    def y(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    parts: list[Html] = []
    for t in ticks:
        parts.append(line(left, y(t), WIDTH - right, y(t), INK if t == 0 else RULE, 1))
        parts.append(text(left - 10, y(t) + 5, plain(t), "end", MUTED))
    for step in columns:
        parts.append(text(x(step), bottom + 20, plain(step), "middle", MUTED))
    parts.append(text((left + WIDTH - right) / 2, bottom + 40, steps, "middle", MUTED))
    middle = (top + bottom) / 2
    parts.append(
        Html(
            f'<text transform="translate(18 {middle:.1f}) rotate(-90)" text-anchor="middle" '
            f'fill="{MUTED}" style="{FONT}">{escape(axis)}</text>'
        )
    )
    for level, place in zip(levels, _apart([y(level.value) for level in levels]), strict=True):
        parts.append(
            Html(
                f'<line x1="{left:.1f}" y1="{y(level.value):.1f}" x2="{WIDTH - right:.1f}" y2="{y(level.value):.1f}" '
                f'stroke="{MUTED}" stroke-width="1.4" stroke-dasharray="5 4"/>'
            )
        )
        parts.append(text(WIDTH - right + 8, place + 5, f"{level.label} {level.value:.3f}", "start", INK))
    for i, curve in enumerate(curves):
        parts += _drawn(curve, COLOURS[i % len(COLOURS)], x, y)
    if len(curves) > 1:
        at = left
        for i, curve in enumerate(curves):
            colour = COLOURS[i % len(COLOURS)]
            parts += [line(at, 14, at + 18, 14, colour, 3), text(at + 24, 19, curve.label, "start", INK)]
            at += 48 + 7.4 * len(curve.label)
    return svg(bottom + 48, title, parts)


def _drawn(curve: Curve, colour: str, x: Callable[[float], float], y: Callable[[float], float]) -> list[Html]:
    n = len(curve.steps)
    kept = sorted({round(i * (n - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)}) if n > MOST_POINTS else range(n)
    points = [(x(curve.steps[i]), y(curve.values[i]), curve.steps[i], curve.values[i]) for i in kept]
    drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b, _, _ in points)
    parts = [Html(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')]
    if n <= FEW:
        for a, b, step, value in points:
            label = escape(f"{curve.label}, {plain(step)}: {value:.4g}")
            parts.append(tag("g", tag("title", label), circle(a, b, 3.5, colour)))
    return parts


def _apart(places: Sequence[float], least: float = 17.0) -> list[float]:
    """The places, moved as little as needed for labels not to overlap, in their order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for above, below in itertools.pairwise(order):
        moved[below] = max(moved[below], moved[above] + least)
    return moved
