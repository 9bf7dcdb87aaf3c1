"""Classes of the user's own, which a config names as `module:Class`, and the options that they take."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, cast

from trimtab.errors import UserError, did_you_mean


def find_class(name: str, what: str) -> type[Any]:
    """A class by `module:Class`.

    A module that is not found otherwise is looked for in the current directory, which then stays at the end of
    `sys.path`, so that the module finds what lies beside it.

    Args:
        name: the module's dotted name, a colon, the class's name.
        what: what the class is for ("task"), for messages.

    Raises:
        UserError: no such module, or no such class in it.
    """
    imported, class_name = module_of(name, what), name.partition(":")[2]
    found: object = getattr(imported, class_name, None)
    if not isinstance(found, type):
        file = getattr(imported, "__file__", None)
        place = f" ({file})" if file else ""
        raise UserError(
            f"{what} {name!r}", f"{imported.__name__}{place} has no class {class_name}", "check the class's name"
        )
    return found


def registered_class(name: str, what: str, known: Mapping[str, type[Any]], *bases: type[Any]) -> type[Any]:
    """A class by the name that it is registered under, or by `module:Class` (see `find_class`).

    Args:
        name: either name.
        what: what the class is for, for messages.
        known: registered classes by name.
        bases: what a class of the user's own is to be derived from, one of them.

    Raises:
        UserError: there is no such class, or it is derived from none of the bases.
    """
    if name in known:
        return known[name]
    if ":" not in name:
        hint = f"{did_you_mean(name, known, '')} choose one, or name your own as module:Class"
        raise UserError(f"{what} {name!r}", f"there are {', '.join(known)}", hint.strip())
    found = find_class(name, what)
    if not issubclass(found, bases):
        public = [f"{'.'.join(base.__module__.split('.')[:2])}.{base.__name__}" for base in bases]
        fix = f"derive it from {' or '.join(base.__name__ for base in bases)}"
        raise UserError(f"{what} {name!r}", f"it is no subclass of {' or '.join(public)}", fix)
    return found


def module_of(name: str, what: str) -> ModuleType:
    """The module of `module:Name`, imported as `find_class` does; a `UserError` if it cannot be."""
    module = name.partition(":")[0]
    try:
        return _import(module)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{what} {name!r}", f"{module} cannot be imported ({error})",
            "check the module's name, and that its file lies in the current directory or is installed",
        ) from error  # fmt: skip


def keyword_types(function: Callable[..., Any]) -> dict[str, Any]:
    """Types of the parameters that a function, or a class, takes by keyword alone: as annotated, else of the default,
    else text."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    try:
        hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    except NameError:  # an annotation that is imported for type checkers only
        hints = {}
    unsaid = (None, inspect.Parameter.empty)
    return {p.name: hints.get(p.name, str if p.default in unsaid else cast(Any, type(p.default))) for p in parameters}


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        here = os.getcwd()
        if error.name != module.partition(".")[0] or here in sys.path:
            raise
        sys.path.append(here)
        importlib.invalidate_caches()
        try:
            return importlib.import_module(module)
        except BaseException:
            sys.path.remove(here)
            raise
