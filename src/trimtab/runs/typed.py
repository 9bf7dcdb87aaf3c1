"""Values of declared types, read from plain ones: what JSON and TOML hold, or texts that say `NAME=VALUE`.

The one reader of configs, options and results. Nothing is guessed: a text is no number, 1.5 is no whole number, true is
not 1. A mistake is a `UserError` that names the field and says what it must be.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

from cattrs import Converter, ForbiddenExtraKeysError, transform_error
from cattrs.cols import list_structure_factory
from cattrs.gen import make_dict_structure_fn
from typing_extensions import Doc

from trimtab.errors import UserError, did_you_mean

_T = TypeVar("_T")
_Hook = Callable[[Any, Any], Any]
_SPOKEN = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
_SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_INFINITE = ("inf", "-inf")
"""What `config_dict` writes for numbers that JSON lacks; in results NaN is written as None, and is given nowhere."""
_SERIES = (tuple, list, Sequence, Collection, Iterable)


def read_typed(kind: type[_T], value: Any, what: str = "") -> _T:
    """A plain value as a value of a type: a dataclass from its fields, a tuple from a list, a path from a text.

    Args:
        kind: the type. Dataclasses may nest; what `config_dict` or `json_safe` made of one is read back as it was.
        value: what JSON or TOML holds.
        what: name of the thing that is read, for messages.

    Raises:
        UserError: a value is of another type, a field is missing or is none of the dataclass's, or the dataclass
            refuses a value.
    """

    def why(error: BaseException, part: Any) -> str:
        if isinstance(error, UserError):  # the dataclass's own
            raise error
        if isinstance(error, KeyError):
            return "it is missing"
        if isinstance(error, _AmbiguousError):
            return f"it may be {' or '.join(error.args)}; say which as type"
        if isinstance(error, ForbiddenExtraKeysError):
            name = min(error.extra_fields)
            return f"there is no {name}; {did_you_mean(name, field_types(error.cl), 'leave it out')}"
        found = f", not {error.args[0]!r}" if isinstance(error, _WrongTypeError) else ""
        return f"it must be {_spoken(part or kind)}{found}"

    try:
        return _CONVERTER.structure(value, kind)
    except Exception as error:
        said, _, where = transform_error(error, what, why)[0].rpartition(" @ ")
        raise UserError(where.lstrip("."), said) from error


def read_options(texts: Sequence[str], known: Mapping[str, Any], *, what: str, owner: str) -> dict[str, Any]:
    """Values by name from texts, each `NAME=VALUE`; several values of a list are parted by commas.

    Args:
        texts: as they were given.
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
            hint = did_you_mean(name, known, "choose one of them" if known else "leave it out")
            raise UserError(f"{what} {name!r}", f"{owner} takes {', '.join(known) or 'none'}", hint)
        if name in found:
            raise UserError(f"{what} {name!r}", "it is given twice", "give it once")
        found[name] = read_typed(known[name], _plain(value, known[name]), f"{what} {name}")
    return found


def option_name(text: str) -> str:
    """The name in `NAME=VALUE`."""
    return text.partition("=")[0].strip().replace("-", "_")


@cache
def field_types(config: type[Any]) -> Mapping[str, Any]:
    """The types of a dataclass's fields by name."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in fields(config)}


@cache
def field_docs(config: type[Any]) -> Mapping[str, str]:
    """What is said of a dataclass's fields, inherited ones included: below each in its source, or as a `Doc`."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        except (OSError, TypeError):  # built in, or made where there is no file
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, below in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(below.value)).split())
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        for about in getattr(hint, "__metadata__", ()):
            if isinstance(about, Doc):
                found[name] = about.documentation
    return found


def takes_list(kind: Any) -> bool:
    """Whether a list of any length may be of a type."""
    return any(map(_is_series, typing.get_args(kind) if _is_union(kind) else (kind,)))


def _spoken(kind: Any) -> str:
    inner = typing.get_args(kind)
    if _is_union(kind):
        return " or ".join(_spoken(part) for part in inner if part is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if _is_series(kind):
        return f"a list, each {_spoken(inner[0] if inner else str)}"
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(inner)}: {', '.join(map(_spoken, inner))}"
    if is_dataclass(kind) or (typing.get_origin(kind) or kind) in (dict, Mapping):
        return "values by name"
    return _SPOKEN.get(kind) or f"of the type {getattr(kind, '__name__', kind)}, which can only be given in Python"


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _is_series(kind: Any) -> bool:
    origin = typing.get_origin(kind)
    return (origin or kind) in _SERIES and (origin is not tuple or ... in typing.get_args(kind))


def _plain(text: str, kind: Any) -> Any:
    """What a text says, as TOML would hold it; the text itself where it says nothing of the type."""
    inner = typing.get_args(kind)
    if _is_union(kind):
        for part in inner:
            with contextlib.suppress(Exception):
                _CONVERTER.structure(_plain(text, part), part)
                return _plain(text, part)
        return text
    if _is_series(kind) or typing.get_origin(kind) is tuple:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        kinds = [(inner or (str,))[0]] * len(parts) if _is_series(kind) else inner
        return [*map(_plain, parts, kinds), *parts[len(kinds) :]]
    if typing.get_origin(kind) is typing.Literal:
        return next((one for one in inner if str(one) == text), text)
    with contextlib.suppress(ValueError):
        return kind(text) if kind in (int, float) else _SWITCHES.get(text.lower(), text) if kind is bool else text
    return text


class _WrongTypeError(Exception):
    """Holds a value that is not of the type it should have."""


class _AmbiguousError(Exception):
    """Holds the names of the dataclasses that values may be the fields of."""


def _exactly(value: Any, *kinds: type[Any]) -> Any:
    if type(value) not in kinds:
        raise _WrongTypeError(value)
    return value


_CONVERTER = Converter()
for _kind in (bool, int, str):
    _CONVERTER.register_structure_hook(_kind, _exactly)
_CONVERTER.register_structure_hook(Path, lambda value, _: Path(_exactly(value, str)))


@_CONVERTER.register_structure_hook
def _float(value: Any, _: Any) -> float:
    if value is None:
        return math.nan
    if value in _INFINITE:
        return float(value)
    if math.isnan(_exactly(value, int, float)):
        raise _WrongTypeError(value)
    return float(value)


@_CONVERTER.register_structure_hook_factory(_is_union)
def _union(kind: Any) -> _Hook:
    """The first of its types that a value is of; of several dataclasses the one that `type` names, or the only one."""
    parts: list[Any] = [part for part in typing.get_args(kind) if part is not types.NoneType]
    classes: dict[Any, Any] = {getattr(part, "__name__", ""): part for part in parts if is_dataclass(part)}

    def hook(value: Any, _: Any) -> Any:
        if value is None and len(parts) < len(typing.get_args(kind)):
            return None
        said = cast(dict[str, Any], value).get("type") if isinstance(value, dict) else None
        asked, found = [classes[said]] if said in classes else parts, dict[Any, Any]()
        for part in asked:
            with contextlib.suppress(Exception):
                found[part] = _CONVERTER.structure(value, part)
        if len(fitting := [name for name, part in classes.items() if part in found]) > 1:
            raise _AmbiguousError(*fitting)
        return next(iter(found.values())) if found else _CONVERTER.structure(value, asked[-1])

    return hook


@_CONVERTER.register_structure_hook_factory(lambda kind: typing.get_origin(kind) is typing.Literal)
def _literal(kind: Any) -> _Hook:
    def hook(value: Any, _: Any) -> Any:
        if (type(value), value) not in [(type(one), one) for one in typing.get_args(kind)]:
            raise _WrongTypeError(value)
        return value

    return hook


@_CONVERTER.register_structure_hook_factory(_is_series)
def _series(kind: Any) -> _Hook:
    """Lists alone: a text is no list of letters."""
    inner: Any = list[(typing.get_args(kind) or (str,))[0]]
    read = list_structure_factory(inner, _CONVERTER)

    def hook(value: Any, _: Any) -> Any:
        found = read(_exactly(value, list, tuple), inner)
        return found if typing.get_origin(kind) is list else tuple(found)

    return hook


@_CONVERTER.register_structure_hook_factory(lambda kind: typing.get_origin(kind) is tuple and not _is_series(kind))
def _fixed(kind: Any) -> _Hook:
    kinds = typing.get_args(kind)

    def hook(value: Any, _: Any) -> Any:
        if len(_exactly(value, list, tuple)) != len(kinds):
            raise _WrongTypeError(value)
        return tuple(map(_CONVERTER.structure, value, kinds))

    return hook


@_CONVERTER.register_structure_hook_factory(is_dataclass)
def _fields(kind: Any) -> _Hook:
    """By name; the class that `config_dict` says beside them under `type` is left out."""
    read, known = make_dict_structure_fn(kind, _CONVERTER, _cattrs_forbid_extra_keys=True), field_types(kind)
    return lambda value, _: read({k: v for k, v in _exactly(value, dict).items() if k != "type" or k in known}, kind)
