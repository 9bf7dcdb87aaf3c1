"""What a page says, read back."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br", "input", "hr"}


class Outline(HTMLParser):
    """Tags with attributes, words, those in drawings, and tables' rows of cells; fails on tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.rows: list[list[str]] = []
        self.drawn: list[str] = []
        self.feed(page)
        assert self.open == []
        self.words = " ".join(self.words.split())

    @classmethod
    def of(cls, path: Path) -> Outline:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "text":
            self.drawn.append("")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["text"]:
            self.drawn[-1] += data
        elif "style" not in self.open:
            self.words += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    def row(self, *first: str) -> list[str]:
        """The one row that begins with these cells."""
        (found,) = [row for row in self.rows if tuple(row[: len(first)]) == first]
        return found

    def titles(self, css: str) -> list[str]:
        """Hover texts of elements of a class."""
        found = [a for _, a in self.tags if css in (a.get("class") or "").split()]
        return [str(a["title"]) for a in found if "title" in a]
