"""Arguments of Python functions: numbers of numpy and torch as Python's own, options by the fields of configs."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from trimtab.errors import UserError, did_you_mean
from trimtab.runs.typed import read_typed

_T = TypeVar("_T")


def read_keywords(given: Mapping[str, Any], known: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword arguments that a function passes on to configs, as values of their types.

    Args:
        given: as they were given; dataclasses stay as they are.
        known: types by name, such as `field_types` of a config.
        function: what takes them; names of its own arguments are proposed, too.

    Raises:
        UserError: there is no such argument, or a value is of another type.
    """
    named = {*known, *inspect.signature(function).parameters} - {"options"}
    for name in given:
        if name not in known:
            hint = did_you_mean(name, sorted(named), f"there is {', '.join(known)}")
            raise UserError(f"{function.__name__}({name}=…)", "it has no such argument", hint)
    return {
        name: value if is_dataclass(value) else read_typed(known[name], plain(value), name)
        for name, value in given.items()
    }


def known_arguments(cls: type[_T]) -> type[_T]:
    """A class decorator: keyword arguments that the class does not have are refused by a `UserError`, which proposes
    the right name. Subclasses may pass on what they are given."""
    init = cls.__init__
    own = [*inspect.signature(init).parameters][1:]

    @functools.wraps(init)
    def checked(self: Any, *given: Any, **named: Any) -> None:
        for name in named:
            if name not in own:
                every = [*inspect.signature(type(self).__init__).parameters][1:]
                known = [one for one in dict.fromkeys([*every, *own]) if one != "options"]
                hint = did_you_mean(name, known, f"there is {', '.join(known)}")
                raise UserError(f"{type(self).__name__}({name}=…)", "it has no such argument", hint)
        init(self, *given, **named)

    cls.__init__ = checked
    return cls


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's numbers and lists, paths as texts, all else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple | range):
        return [plain(one) for one in cast("list[Any]", value)]
    return os.fspath(cast("os.PathLike[str]", value)) if isinstance(value, os.PathLike) else value


def as_path(given: Any, what: str) -> Path:
    """A path. Raises a `UserError` if what is given as one is neither a text nor a path."""
    if isinstance(given, str | os.PathLike):
        return Path(cast("str | os.PathLike[str]", given))
    raise UserError(f"the {type(given).__name__} that is given as {what}", "it is no path", "give one, like runs/mine")


def whole_number(given: Any, what: str, least: int | None = None) -> int:
    """One whole number of Python, numpy or torch.

    Args:
        given: the number.
        what: what it is called, for messages.
        least: what it must be at least.

    Raises:
        UserError: it is none, or too small.
    """
    found = plain(given)
    if not isinstance(found, int) or isinstance(found, bool):
        raise UserError(f"{what} {given!r}", "it is no whole number", "give one, like 3")
    if least is not None and found < least:
        raise UserError(f"{what} {found}", f"it must be at least {least}", "change it")
    return found


def whole_numbers(given: Any, what: str) -> list[int]:
    """One whole number or several, of Python, numpy or torch, as a flat list.

    Args:
        given: a number, an array or a list, of any shape.
        what: what one of them is called, for messages.

    Raises:
        UserError: one is no whole number.
    """
    found = plain(given)
    if isinstance(found, list):
        return [number for one in cast("list[Any]", found) for number in whole_numbers(one, what)]
    if isinstance(found, int) and not isinstance(found, bool):
        return [found]
    hint = f"give {found.strip()} without quotes" if isinstance(found, str) and found.strip().isdigit() else "give 3"
    raise UserError(f"{what} {found!r}", f"{what}s are whole numbers", f"{hint}, or several like [3, 14]")
