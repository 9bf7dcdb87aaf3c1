"""Options that are given as `NAME=VALUE`, as the values of the types that a task's loader or a judge asks for."""

from __future__ import annotations

import collections.abc
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import UserError

_SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_READERS: dict[Any, tuple[collections.abc.Callable[[str], Any], str]] = {
    bool: (lambda text: _SWITCHES[text.lower()], "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "a text"),
    Path: (Path, "a path"),
}
_MANY = (collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable, tuple, list)


def read_options(texts: Sequence[str], known: Mapping[str, Any], *, what: str, owner: str) -> dict[str, Any]:
    """Values by name.

    Args:
        texts: each `NAME=VALUE`; several values of a list are parted by commas.
        known: types by name.
        what: `task option` or `judge option`, for messages.
        owner: what takes them, for messages.

    Raises:
        UserError: a text is no `NAME=VALUE`, a name is not known or given twice, or a value is not of its type.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, value = option_name(text), text.partition("=")[2]
        if "=" not in text:
            raise UserError(f"{what} {text!r}", "it has no value", "write NAME=VALUE")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            mend = f"did you mean {close[0]}?" if close else "choose one of them" if known else "leave it out"
            raise UserError(f"{what} {name!r}", f"{owner} takes {', '.join(known) or 'none'}", mend)
        if name in found:
            raise UserError(f"{what} {name!r}", "it is given twice", "give it once")
        try:
            found[name] = _read(known[name], value)
        except _WrongKindError as error:
            raise UserError(f"{what} {text!r}", f"it must be {error}", "change the value") from error
    return found


def option_name(text: str) -> str:
    """The name in `NAME=VALUE`."""
    return text.partition("=")[0].strip().replace("-", "_")


class _WrongKindError(Exception):
    """A text is not of a type; the message says what would be."""


def _read(kind: Any, text: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (kind, *_) = (part for part in inner if part is not types.NoneType)
        return _read(kind, text)
    if origin is typing.Literal:
        for value in inner:
            if str(value) == text:
                return value
        raise _WrongKindError(f"one of {', '.join(map(str, inner))}")
    if (origin or kind) in _MANY:
        each = inner[0] if inner else str
        return tuple(_read(each, part.strip()) for part in text.split(",") if part.strip())
    if kind not in _READERS:
        raise _WrongKindError(f"of the type {getattr(kind, '__name__', kind)}, which can only be given in Python")
    read, name = _READERS[kind]
    try:
        return read(text)
    except (ValueError, KeyError) as error:
        raise _WrongKindError(name) from error
