"""Figures of results, drawn on a matplotlib axis: what reports embed and `result.plot()` shows.

`svg` draws the same file every time, in which texts are texts; it needs nothing from outside.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# matplotlib's stubs leave out types of many arguments.
from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.stats import Interval, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCENT, INK, MUTED, RULE = "#0b6e8a", "#1b2126", "#64707d", "#dfe4e8"
COLOURS = (ACCENT, "#b3661a", "#4a5560", "#7a4fa3", "#1f8a4c", "#a0394b")
WIDTH = 8.6
"""Inches of a drawing of full width, of which texts are 9.5 points high."""
ROW = 0.31
"""Inches of a row of intervals."""
FEW = 40
"""Curves with at most as many points show them as dots."""
MOST_TICKS = 8
"""At most as many steps have a tick each."""
_STYLE: Any = {
    "svg.hashsalt": "trimtab", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.5,
    "axes.labelsize": 9.5, "axes.labelcolor": MUTED, "axes.edgecolor": RULE, "axes.axisbelow": True, "text.color": INK,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.color": RULE, "ytick.color": RULE,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": RULE, "legend.frameon": False,
}  # fmt: skip


class Mark(NamedTuple):
    """One row of a plot of intervals."""

    label: str
    value: Interval
    group: str = ""
    """Rows of a group stand together, below its name."""
    points: Sequence[float] = ()
    """Single observations, drawn small beside the estimate."""
    strong: bool = False


class Curve(NamedTuple):
    """Values at steps."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]


class Head(NamedTuple):
    """An attention head of a circuit."""

    layer: int
    head: int
    role: str
    effect: float | None = None


class Point(NamedTuple):
    """Two measurements of one thing."""

    x: float
    y: float
    kind: str


class MarkedLine(NamedTuple):
    """Points that are joined, one of which counts."""

    label: str
    points: Sequence[tuple[float, float]]
    marked: tuple[float, float]
    strong: bool = False


class Level(NamedTuple):
    """A horizontal line to read curves against."""

    label: str
    value: float


def plot_intervals(ax: Axes, marks: Sequence[Mark], axis: str, form: str = "+.3f") -> None:
    """Estimates with whiskers, a row each, zero marked; the numbers stand to the right of the frame.

    Args:
        ax: to draw on.
        marks: rows, top first.
        axis: what the horizontal axis measures.
        form: format of the numbers.
    """
    rows: list[tuple[str, Mark | None]] = []
    for group, members in groupby(marks, key=lambda mark: mark.group):
        rows += [(group, None)] * bool(group) + [(mark.label, mark) for mark in members]
    ax.axvline(0, color=INK, linewidth=1)
    for y, (_, mark) in enumerate(rows):
        if mark is not None:
            value, colour = mark.value, ACCENT if mark.strong else COLOURS[2]
            ax.scatter(mark.points, [y] * len(mark.points), s=9, color="#b6c0c8")
            ax.plot([value.low, value.high], [y, y], color=colour, linewidth=1.8)
            ax.scatter([value.estimate], [y], s=30, color=colour, zorder=3)
    ax.set_yticks(range(len(rows)), [label for label, _ in rows])
    for label, (_, mark) in zip(ax.get_yticklabels(), rows, strict=True):
        label.set(color=INK, weight="bold" if mark is None or mark.strong else "normal")
    shown = {y: number_text(mark.value, form).replace("-", "−") for y, (_, mark) in enumerate(rows) if mark is not None}
    _write_beside(ax, list(shown), list(shown.values()))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel(axis)


def plot_curves(
    ax: Axes, curves: Sequence[Curve], axis: str, *, levels: Sequence[Level] = (), steps: str = "iteration"
) -> None:
    """Curves with a legend; levels are dashed, and named at the right with their values.

    Args:
        ax: to draw on.
        curves: the curves.
        axis: what the vertical axis measures.
        levels: horizontal lines.
        steps: what the horizontal axis counts.
    """
    for curve, colour in zip(curves, COLOURS * len(curves), strict=False):
        marker = "o" if len(curve.steps) <= FEW else None
        ax.plot(
            curve.steps, curve.values, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=curve.label
        )
    for level in levels:
        ax.axhline(level.value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    if levels:
        _name_levels(ax, levels)
    if len(curves) > 1:
        ax.legend(ncols=min(3, len(curves)), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    places = sorted({step for curve in curves for step in curve.steps})
    if len(places) <= MOST_TICKS:
        ax.set_xticks(places)
    else:
        ax.locator_params(axis="x", integer=all(float(place).is_integer() for place in places))
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.grid(axis="y")
    ax.set(xlabel=steps, ylabel=axis)


def plot_ranks(ax: Axes, curve: Curve, axis: str) -> None:
    """Scores by rank.

    Args:
        ax: to draw on.
        curve: scores at ranks.
        axis: what the scores are.
    """
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.plot(curve.steps, curve.values, color=COLOURS[2], linewidth=1.6)
    ax.locator_params(axis="x", integer=True)
    ax.grid(axis="y")
    ax.set(xlabel="rank", ylabel=axis)


def plot_bars(ax: Axes, edges: Sequence[float], counts: Sequence[int], axis: str) -> None:
    """A histogram.

    Args:
        ax: to draw on.
        edges: bounds of the bins.
        counts: in each bin.
        axis: what is binned.
    """
    ax.stairs(counts, edges, fill=True, color=ACCENT)
    ax.grid(axis="y")
    ax.set(xlabel=axis, ylabel="features")


def plot_heads(ax: Axes, heads: Sequence[Head]) -> None:
    """Heads by layer and number, larger the larger their effect, a colour for each role.

    Args:
        ax: to draw on.
        heads: a head may have several roles.
    """
    most = max((abs(head.effect) for head in heads if head.effect), default=1.0)
    for colour, role in enumerate(dict.fromkeys(head.role for head in heads)):
        own = [head for head in heads if head.role == role]
        sizes = [40 + 200 * abs(most / 2 if head.effect is None else head.effect) / most for head in own]
        places = [head.layer for head in own], [head.head for head in own]
        ax.scatter(*places, s=sizes, label=role, alpha=0.75, color=COLOURS[colour % len(COLOURS)])
    for layer, head in dict.fromkeys((head.layer, head.head) for head in heads):
        ax.annotate(f"{layer}.{head}", (layer, head), textcoords="offset points", xytext=(7, 5))
    ax.set(xlabel="layer", ylabel="head")
    ax.margins(0.12)
    ax.grid(axis="x")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), markerscale=0.6)


def plot_points(ax: Axes, points: Sequence[Point], x_axis: str, y_axis: str, *, diagonal: bool = True) -> None:
    """Points, a colour for each kind, beside the diagonal on which both measurements are equal.

    Args:
        ax: to draw on.
        points: the points.
        x_axis: what the horizontal axis measures.
        y_axis: what the vertical axis measures, in the same unit.
        diagonal: whether to draw it; not where units differ.
    """
    for colour, kind in zip(COLOURS, dict.fromkeys(point.kind for point in points), strict=False):
        own = [point for point in points if point.kind == kind]
        ax.scatter([p.x for p in own], [p.y for p in own], s=24, label=kind, alpha=0.75, color=colour)
    if diagonal:
        ends = [value for point in points for value in (point.x, point.y)]
        ax.plot([min(ends), max(ends)], [min(ends), max(ends)], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    ax.grid()
    ax.set(xlabel=x_axis, ylabel=y_axis)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def plot_lines(ax: Axes, lines: Sequence[MarkedLine], x_axis: str, y_axis: str) -> None:
    """Lines through points, each with one of them marked.

    Args:
        ax: to draw on.
        lines: in the order of the legend.
        x_axis: what the horizontal axis measures.
        y_axis: what the vertical axis measures.
    """
    ax.axhline(0, color=INK, linewidth=0.8)
    for line, colour in zip(lines, COLOURS * len(lines), strict=False):
        style = "-" if line.strong else (0, (4, 2))
        xs, ys = zip(*line.points, strict=True)
        ax.plot(xs, ys, color=colour, linewidth=2.2 if line.strong else 1.2, linestyle=style, marker=".")
        ax.scatter(*line.marked, s=60 if line.strong else 30, color=colour, label=line.label, zorder=3)
    ax.grid()
    ax.set(xlabel=x_axis, ylabel=y_axis)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _name_levels(ax: Axes, levels: Sequence[Level]) -> None:
    """Names beside the lines, moved apart where lines are closer than a name is high."""
    low, high = ax.get_ylim()
    apart = (high - low) * 0.07
    ax.set_ylim(low, high)
    at = low - apart
    places: list[float] = []
    ordered = sorted(levels, key=lambda level: level.value)
    for level in ordered:
        at = max(level.value, at + apart)
        places.append(at)
    excess = places[-1] - high
    places = [place - excess for place in places] if excess > 0 else places
    _write_beside(ax, places, [f"{level.label} {number_text(level.value, '.3f')}" for level in ordered])


def _write_beside(ax: Axes, places: Sequence[float], texts: Sequence[str]) -> None:
    """Texts to the right of the frame."""
    right = ax.secondary_yaxis("right")
    right.set_yticks(places, texts)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)


def own_axis(draw: Callable[[Axes], None], ax: Axes | None = None) -> Axes:
    """Draw on an axis, or on that of a new figure, which a notebook shows.

    Args:
        draw: draws on an axis.
        ax: the axis.
    """
    import matplotlib.pyplot as plt

    # Made outside the context, which would undo what a notebook sets with its first figure.
    figure = None if ax else plt.figure(figsize=(WIDTH, 2.8), layout="constrained")
    try:
        with plt.rc_context(_STYLE):
            found = ax or plt.gca()
            draw(found)
    except BaseException:
        if figure is not None:
            plt.close(figure)
        raise
    return found


def svg(draw: Callable[[Axes], None], title: str, *, height: float = 2.8) -> str:
    """A drawing as inline SVG, the same bytes every time.

    Args:
        draw: draws on an axis.
        title: read out in place of the drawing.
        height: inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    text = file.getvalue()
    drawing = re.sub(r' id="[\w.]+_\d+"', "", text[text.index("<defs>") :]).replace("'DejaVu Sans'", "system-ui")
    size = f"{WIDTH * 72:g} {height * 72:g}"
    named = html.escape(title)
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} viewBox="0 0 {size}" role="img" aria-label="{named}"><title>{named}</title>\n{drawing}'
