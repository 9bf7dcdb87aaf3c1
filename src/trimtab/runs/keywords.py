"""Arguments of Python functions: numbers of numpy and torch as Python's own, options by the fields of configs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, cast

from trimtab.errors import UserError, did_you_mean
from trimtab.runs.typed import read_typed


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


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's numbers and lists, paths as texts, all else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple | range):
        return [plain(one) for one in cast("list[Any]", value)]
    return os.fspath(cast("os.PathLike[str]", value)) if isinstance(value, os.PathLike) else value


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
