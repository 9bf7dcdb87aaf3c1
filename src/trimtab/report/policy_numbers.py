"""How a policy's numbers, texts and absent parts are written on its page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.report.page import Html, escape, number, tag
from trimtab.stats import interval_of, number_text

HIDDEN = "hidden"


def cell(fields: dict[str, Any] | None, digits: int = 3, *, signed: bool = False) -> Html:
    """An estimate with its interval, or a dash."""
    return number(interval_of(fields), digits, signed=signed)


def plain_number(value: float | None, form: str = ".3g") -> Html:
    """A number, or a dash."""
    return number(None) if value is None else escape(number_text(value, form).replace("-", "−"))


def sentence(fields: dict[str, Any]) -> str:
    """An estimate with its interval, for running text, with a sign."""
    return number_text(interval_of(fields), "+.3f").replace("-", "−")


def feature_name(feature: int) -> str:
    """A feature's number; below 0 stands no edit."""
    return "no edit" if feature < 0 else str(feature)


def visible(token: str) -> str:
    """A token's text with what is invisible made visible, outer blanks too."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    if not shown.strip():
        return "␣" * len(shown) or "∅"
    return shown


def absent(what: str, command: str) -> Html:
    """A line in place of a part that is not there."""
    return tag("p", escape(f"{what} Made by "), tag("code", escape(command)), escape("."), class_="none")


def notes(title: str, lines: Sequence[str]) -> list[Html]:
    """A titled list, or nothing."""
    if not lines:
        return []
    return [tag("h3", escape(title)), tag("ul", *(tag("li", escape(one)) for one in lines))]
