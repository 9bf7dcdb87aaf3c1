"""The one exception for a user's mistake: what is wrong, why, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

_T = TypeVar("_T")


class UserError(ValueError):
    """Something that the user can fix. The command line prints it as one line and exits with 2.

    Args:
        what: the thing that is wrong, with its name and value ("site resid_post.99").
        why: the rule that it breaks ("the model has layers 0 to 29").
        hint: what to do instead ("choose a layer below 30").
    """

    def __init__(self, what: str, why: str = "", hint: str = "") -> None:
        self.what, self.why, self.hint = what, why, hint
        super().__init__(": ".join(part for part in (what, why) if part) + (f"; {hint}" if hint else ""))

    @property
    def line(self) -> str:
        """The message on one line, as the command line prints it."""
        return " ".join(str(self).split())

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback."""
        return [f"{type(self).__name__}: {self.line}"]


def check_one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise a `UserError` unless a value is one of a few texts."""
    known = list(allowed)
    if value not in known:
        raise UserError(f"{name} {value!r}", f"allowed are {', '.join(known)}", "choose one of them")


def named(known: Mapping[str, _T], name: str, what: str) -> _T:
    """What has a name. Raises a `UserError` that says which names there are if it is none of them."""
    if name in known:
        return known[name]
    hint = did_you_mean(str(name), known, "choose one of them")
    raise UserError(f"{what} {name!r}", f"there is {', '.join(known) or 'none'}", hint)


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to do about a name that is not known: take the nearest that is, or something else where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else otherwise
