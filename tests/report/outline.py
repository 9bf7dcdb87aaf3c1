"""What a page says, read back."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "line", "circle", "polyline", "img", "br"}


class Outline(HTMLParser):
    """Tags in order, with attributes, and the words; fails on tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def titles(self, css: str) -> list[str]:
        """Hover texts of elements of a class."""
        found = [a for _, a in self.tags if css in (a.get("class") or "").split()]
        return [str(a["title"]) for a in found if "title" in a]
