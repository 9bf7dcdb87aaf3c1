"""Checks of a config's fields: what is out of bounds, or none of a few texts, is a `UserError` that names the field."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal, cast, get_args, get_origin

from trimtab.errors import UserError
from trimtab.runs.typed import field_types


def check_values(config: Any, rule: str, ok: Callable[[Any], bool], *names: str) -> None:
    """Raise a `UserError` unless fields of a dataclass are as a rule says.

    Args:
        config: the dataclass.
        rule: what they must be, for messages, such as `from 0 to 1`.
        ok: whether a value is so.
        names: of the fields. Where one holds several values each is checked; None is let pass.
    """
    for name in names:
        for one in _each(getattr(config, name)):
            try:
                good = one is None or ok(one)
            except TypeError:
                raise UserError(f"{name} {one!r}", f"it must be {rule}", "give a number") from None
            if not good:
                raise UserError(f"{name} {one}", f"it must be {rule}", "change it")


def check_least(config: Any, least: float, *names: str) -> None:
    """Raise a `UserError` unless fields of a dataclass are at least so much; None is let pass."""
    check_values(config, f"at least {least}", lambda value: value >= least, *names)


def check_choices(config: Any) -> None:
    """Raise a `UserError` if a field of a dataclass that is one of a few texts, or several of them, is another."""
    for name, kind in field_types(config.__class__).items():
        kinds: list[Any] = [kind]
        for part in kinds:  # a union's and a tuple's parts, too
            kinds += [] if get_origin(part) is Literal else [p for p in get_args(part) if p is not ...]
        choices = [text for part in kinds if get_origin(part) is Literal for text in get_args(part)]
        for one in _each(getattr(config, name)):
            if choices and one not in choices and not (one is None and types.NoneType in kinds):
                raise UserError(f"{name} {one!r}", f"it is one of {', '.join(choices)}", "choose one")


def _each(value: Any) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)
