"""Figures as inline SVG, written by hand so that a page needs no library and scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from trimtab.report.page import Html, escape, tag
from trimtab.report.style import ACCENT, INK, MUTED, RULE
from trimtab.stats import Interval

WIDTH = 860.0
FONT = "font-family:inherit;font-size:14px"


class Mark(NamedTuple):
    """One row of an interval plot."""

    label: str
    value: Interval
    points: Sequence[float] = ()
    """Single observations, drawn small beside the estimate."""
    strong: bool = False


def interval_plot(marks: Sequence[Mark], axis: str, title: str, *, factor: float = 1.0) -> Html:
    """Estimates with whiskers, one row each, zero marked.

    Args:
        marks: the rows, top first.
        axis: what the horizontal axis measures.
        title: read out in place of the drawing.
        factor: values are multiplied by this.
    """
    left = max(190.0, 20 + 7.4 * max((len(m.label) for m in marks), default=0))
    right, top, step = 150.0, 14.0, 38.0
    bounds = [0.0] + [v * factor for m in marks for v in (m.value.low, m.value.high, m.value.estimate, *m.points)]
    ticks = nice_ticks(min(b for b in bounds if b == b), max(b for b in bounds if b == b))
    bottom = top + step * len(marks)

    def x(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - left - right)

    parts: list[Html] = []
    for t in ticks:
        zero = t == 0
        parts.append(line(x(t), top, x(t), bottom, INK if zero else RULE, 1.2 if zero else 1))
        parts.append(text(x(t), bottom + 18, plain(t), "middle", MUTED))
    parts.append(text((x(ticks[0]) + x(ticks[-1])) / 2, bottom + 38, axis, "middle", MUTED))
    for i, mark in enumerate(marks):
        y, colour = top + step * (i + 0.5), ACCENT if mark.strong else "#4a5560"
        v = mark.value
        parts.append(text(left - 14, y + 5, mark.label, "end", INK, bold=mark.strong))
        for point in mark.points:
            parts.append(circle(x(point * factor), y, 3, "#b6c0c8"))
        if v.low == v.low:
            parts.append(line(x(v.low * factor), y, x(v.high * factor), y, colour, 2.4))
        parts.append(circle(x(v.estimate * factor), y, 5.5, colour))
        shown = f"{v.estimate * factor:+.1f} [{v.low * factor:+.1f}, {v.high * factor:+.1f}]".replace("-", "−")
        parts.append(text(WIDTH, y + 5, shown, "end", colour, bold=mark.strong))
    return svg(bottom + 46, title, parts)


def rank_curve(
    ranks: Sequence[float], scores: Sequence[float], marked: Sequence[tuple[int, float, str]], axis: str, title: str
) -> Html:
    """Scores by rank as a curve, with some features marked.

    Args:
        ranks, scores: the curve.
        marked: rank, score and label of the features to mark.
        axis: what the vertical axis measures.
        title: read out in place of the drawing.
    """
    left, right, top, bottom = 70.0, 20.0, 14.0, 250.0
    ticks = nice_ticks(min(scores), max(scores))
    last = max(max(ranks), 1)

    def x(rank: float) -> float:
        return left + rank / last * (WIDTH - left - right)

    def y(score: float) -> float:
        return bottom - (score - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    parts: list[Html] = []
    for t in ticks:
        parts.append(line(left, y(t), WIDTH - right, y(t), INK if t == 0 else RULE, 1))
        parts.append(text(left - 10, y(t) + 5, plain(t), "end", MUTED))
    for rank in nice_ticks(0, last):
        if rank <= last:
            parts.append(text(x(rank), bottom + 20, f"{rank:,.0f}", "middle", MUTED))
    parts.append(text((left + WIDTH - right) / 2, bottom + 40, "rank among live features", "middle", MUTED))
    parts.append(
        Html(
            f'<text transform="translate(18 {(top + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle" '
            f'fill="{MUTED}" style="{FONT}">{escape(axis)}</text>'
        )
    )
    points = " ".join(f"{x(r):.1f},{y(s):.1f}" for r, s in zip(ranks, scores, strict=True))
    parts.append(Html(f'<polyline points="{points}" fill="none" stroke="#4a5560" stroke-width="2"/>'))
    for rank, score, label in marked:
        dot = circle(x(rank), y(score), 5, ACCENT)
        parts.append(tag("g", tag("title", escape(label)), dot))
    return svg(bottom + 48, title, parts)


def nice_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers that cover a range, from at or below `low` to at or above `high`."""
    span = high - low or abs(high) or 1.0
    raw = span / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def svg(height: float, title: str, parts: Sequence[Html]) -> Html:
    """A drawing of the full width, its title read out in its place."""
    return Html(
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> Html:
    """A straight line."""
    return Html(
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'
    )


def circle(x: float, y: float, radius: float, colour: str) -> Html:
    """A dot."""
    return Html(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')


def text(x: float, y: float, words: str, anchor: str, colour: str, *, bold: bool = False) -> Html:
    """Words in a drawing, anchored at their `start`, `middle` or `end`."""
    weight = ";font-weight:600" if bold else ""
    return Html(
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" style="{FONT}{weight}">'
        f"{escape(words)}</text>"
    )


def plain(value: float) -> str:
    """A number as short as it goes, with a true minus."""
    return f"{value:g}".replace("-", "−")
