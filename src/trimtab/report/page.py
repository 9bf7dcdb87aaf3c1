"""Build one self-contained HTML page: sections of text, tables with intervals, figures and texts.

No script, no network, nothing but the file: it opens from disk, prints, and reads well in a screen reader. Every text
that is given is escaped; only what this package builds is markup.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

from trimtab.report.style import STYLE
from trimtab.stats import Interval, number_text

Html = NewType("Html", str)
"""Markup that is safe to put into a page."""


def escape(text: object) -> Html:
    """A text as markup."""
    return Html(html.escape(str(text), quote=True))


def join(parts: Sequence[Html], separator: str = "") -> Html:
    """Several pieces of markup as one."""
    return Html(escape(separator).join(parts))


def tag(name: str, *content: Html | str, **attributes: str) -> Html:
    """An element. Content that is not `Html` is escaped by the caller; `class_` becomes `class`, `_` becomes `-`."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{''.join(content)}</{name}>")


def paragraph(text: str) -> Html:
    """A paragraph of plain text."""
    return tag("p", escape(text))


def number(value: Interval | None, digits: int = 2, factor: float = 1.0, *, signed: bool = False) -> Html:
    """An estimate with its interval beneath, or a dash."""
    if value is None:
        return tag("span", escape("–"), class_="none")
    text = number_text(value.scaled(factor), f"{'+' if signed else ''}.{digits}f").replace("-", "−")
    estimate, _, bounds = text.partition(" ")
    shown = tag("b", escape(estimate))
    return Html(f"{shown} {tag('span', escape(bounds), class_='interval')}") if bounds else shown


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    note: str = ""
    """A unit or a remark, below the title."""
    numeric: bool = True


def table(columns: Sequence[Column], rows: Sequence[Sequence[Html]], caption: str = "", emphasis: int = -1) -> Html:
    """A table whose first column names the row; nothing where there is no row.

    Args:
        columns: titles.
        rows: cells, as many as columns.
        caption: what the table shows.
        emphasis: a row to set off.
    """
    if not rows:
        return Html("")
    head = join(
        [
            tag(
                "th",
                escape(c.title),
                *([tag("small", escape(c.note))] if c.note else []),
                scope="col",
                class_="number" if c.numeric else "words",
            )
            for c in columns
        ]
    )
    body: list[Html] = []
    for i, row in enumerate(rows):
        cells = [tag("th", row[0], scope="row", class_="words")]
        cells += [
            tag("td", cell, class_="number" if column.numeric else "words", data_label=column.title)
            for cell, column in zip(row[1:], columns[1:], strict=True)
        ]
        body.append(tag("tr", *cells, **({"class_": "emphasis"} if i == emphasis else {})))
    parts = [tag("caption", escape(caption))] if caption else []
    parts += [tag("thead", tag("tr", head)), tag("tbody", *body)]
    return tag("div", tag("table", *parts), class_="scroll", role="region", tabindex="0", aria_label=caption or "table")


def figure(svg: Html, caption: str) -> Html:
    """A drawing with its caption."""
    return tag("figure", svg, tag("figcaption", escape(caption)))


def facts(pairs: Sequence[tuple[str, str]]) -> Html:
    """Names and values, as a list."""
    return tag("dl", *(Html(tag("dt", escape(k)) + tag("dd", escape(v))) for k, v in pairs), class_="facts")


def callout(text: str, *, good: bool) -> Html:
    """The page's answer, set off."""
    return tag("p", escape(text), class_=f"verdict {'yes' if good else 'no'}", role="status")


def details(summary: str, *content: Html) -> Html:
    """Something to unfold; nothing where it is empty."""
    return Html("") if not any(content) else tag("details", tag("summary", escape(summary)), *content)


@dataclass
class Page:
    """A page of sections, in the order in which they are added."""

    title: str
    lead: str = ""
    """One sentence below the title."""

    def __post_init__(self) -> None:
        self._parts: list[Html] = []

    def add(self, *content: Html) -> None:
        """Put content at the end."""
        self._parts += content

    def section(self, title: str, *content: Html) -> None:
        """Put a titled section at the end."""
        self._parts.append(tag("section", tag("h2", escape(title)), *content))

    def render(self) -> str:
        """The whole file."""
        header = tag("header", tag("h1", escape(self.title)), *([tag("p", escape(self.lead))] if self.lead else []))
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            # Nothing is fetched and nothing runs, whatever a model wrote into the page.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"{header}\n{''.join(f'{part}{chr(10)}' for part in self._parts)}</main>\n</body>\n</html>\n"
        )
