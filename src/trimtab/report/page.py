"""Pages from templates: one self-contained HTML file each, of sections, tables with intervals and figures.

No script, no network, nothing but the file: it opens from disk, prints, and reads well in a screen reader. Every text
that a run holds is escaped; only templates and this room's `Markup` are markup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from trimtab.runs import figures
from trimtab.runs.tables import Column
from trimtab.stats import Interval, interval_of, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing with its caption."""

    drawing: Markup
    caption: str


def figure(draw: Callable[..., None], title: str, caption: str, *, height: float = 2.8, **what: Any) -> Figure:
    """A figure by one of the functions of `trimtab.runs.figures`.

    Args:
        draw: the function.
        title: read out in place of the drawing.
        caption: stands below it.
        height: in inches.
        what: arguments of the function.
    """
    bound: Callable[[Axes], None] = partial(draw, **what)
    return Figure(drawing=Markup(figures.svg(bound, title, height=height)), caption=caption)


def render(template: str, **values: Any) -> str:
    """The whole file.

    Args:
        template: name of a file of `templates/`, without its ending.
        values: what it shows; `title`, `files` and `lead`, one sentence below the title (the run by default), among
            them.
    """
    return _environment().get_template(f"{template}.html").render(**values)


def number(value: Interval | Mapping[str, Any] | float | None, form: str = ".3f") -> str:
    """A number, or an estimate with its interval, as text with a true minus; a dash for nothing."""
    found = interval_of(dict(value)) if isinstance(value, Mapping) else value
    return number_text(found, form).replace("-", "−")


def cell(column: Column, row: Any) -> Markup:
    """What a table holds: a text, a number, an estimate with its interval beneath, or a dash."""
    value = column.cell(row)
    if isinstance(value, str):
        return escape(value)
    text = number(value, column.form)
    if text == "–":
        return Markup('<span class="none">–</span>')
    if not isinstance(value, Interval):
        return escape(text)
    estimate, _, bounds = text.partition(" ")
    shown = Markup("<b>{}</b>").format(estimate)
    return Markup('{} <span class="interval">{}</span>').format(shown, bounds) if bounds else shown


def visible(token: str) -> str:
    """A token's text with what is invisible made visible, outer blanks too."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    return shown if shown.strip() else "␣" * len(shown) or "∅"


def tokens(texts: Sequence[str]) -> Markup:
    """Some tokens, each in a box."""
    boxes = Markup("").join(Markup("<span>{}</span>").format(visible(text)) for text in texts)
    return Markup('<span class="lens">{}</span>').format(boxes)


@cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    found.filters.update({"number": number, "visible": visible, "tokens": tokens})  # pyright: ignore[reportUnknownMemberType]
    found.globals.update({"cell": cell, "style": Markup((TEMPLATES / "style.css").read_text("utf-8"))})  # pyright: ignore[reportUnknownMemberType]
    return found
