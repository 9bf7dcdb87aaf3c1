"""Bank files: TOML with a table of defaults and a table for each member or product of members.

[defaults]                     # any option of `trimtab train`
text = ["my_texts"]
n_features = 8192
seed = [0, 1]                  # lists multiply

[[member]]                     # 2 × 3 members for each seed
arch = ["topk", "batchtopk"]
l0 = [16, 32, 64]

[[member]]
arch = "relu"
sparsity_weight = 0.5
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.training.config import TrainConfig


@dataclass(frozen=True)
class BankFile:
    """What a bank file says, with values of the right types."""

    path: Path
    defaults: dict[str, Any]
    """Values by option; those of which the command line takes several are tuples."""
    members: tuple[dict[str, tuple[Any, ...]], ...]
    """Values to combine, by field, one mapping for each `[[member]]`."""

    def places(self) -> list[tuple[str, Mapping[str, Sequence[Any]]]]:
        """Each member table, with the place that messages name; one empty table if there is none."""
        tables = self.members or ({},)
        return [(f"{self.path}: [[member]] {number}: ", table) for number, table in enumerate(tables, 1)]


def read_bank_file(path: Path, options: type[Any]) -> BankFile:
    """Read a bank file.

    Args:
        path: of the file.
        options: dataclass whose fields `[defaults]` may set.

    Raises:
        UserError: the file cannot be read, is no TOML, or holds a wrong table, key or type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"bank file {path}", f"it cannot be read ({error})", "name a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"bank file {path}", f"it is not TOML ({error})", "mend it") from error
    for table in content:
        if table not in ("defaults", "member"):
            mend = "did you mean [[member]]?" if table.startswith("mem") else "did you mean [defaults]?"
            raise UserError(f"{path}: {table}", "a bank file holds [defaults] and [[member]]", mend)
    defaults, members = content.get("defaults", {}), content.get("member", [])
    if not isinstance(defaults, dict):
        raise UserError(f"{path}: defaults", "it is no table", "write [defaults]")
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise UserError(f"{path}: member", "it is no list of tables", "write [[member]]")
    of_options = {name: hint for name, hint in _hints(options).items() if name not in ("bank",)}
    of_member = _hints(TrainConfig) | {"site": str}
    return BankFile(
        path,
        {key: _default(f"{path}: [defaults]", key, value, of_options) for key, value in defaults.items()},
        tuple(
            {
                key: _values(f"{path}: [[member]] {number}", key, value, of_member, of_options)
                for key, value in m.items()
            }
            for number, m in enumerate(members, 1)
        ),
    )


def _default(place: str, key: str, value: Any, hints: Mapping[str, Any]) -> Any:
    hint = _hint(place, key, hints)
    if typing.get_origin(hint) is tuple and not isinstance(value, list):
        value = [value]
    return _typed(place, key, value, hint)


def _values(place: str, key: str, value: Any, hints: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Any, ...]:
    if key in shared and key not in hints:
        raise UserError(f"{place}: {key}", "all members share it", "move it to [defaults]")
    hint = _hint(place, key, hints)
    several = isinstance(value, list)
    if _takes_list(hint):
        several = several and all(isinstance(part, list) for part in value)
    if value == []:
        raise UserError(f"{place}: {key}", "the list is empty", "name at least one value")
    return tuple(_typed(place, key, part, hint) for part in (value if several else [value]))


def _hint(place: str, key: str, hints: Mapping[str, Any]) -> Any:
    if key in hints:
        return hints[key]
    close = difflib.get_close_matches(key.replace("-", "_"), hints, n=1)
    mend = f"did you mean {close[0]}?" if close else "see trimtab train --help"
    raise UserError(f"{place}: {key}", "there is no such option", mend)


def _typed(place: str, key: str, value: Any, hint: Any) -> Any:
    for kind in _alternatives(hint):
        try:
            return _converted(value, kind)
        except TypeError:
            continue
    wanted = " or ".join(_spoken(kind) for kind in _alternatives(hint) if kind is not type(None))
    raise UserError(f"{place}: {key} = {value!r}", f"it must be {wanted}", "change it")


def _converted(value: Any, kind: Any) -> Any:
    """The value in a type. Raises `TypeError` if it is of another."""
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        (part, *_) = typing.get_args(kind)
        return tuple(_converted(item, part) for item in value)
    if typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise TypeError


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # `Literal[...] | None` is the latter
    return typing.get_args(hint) if is_union else (hint,)


def _takes_list(hint: Any) -> bool:
    return any(typing.get_origin(kind) is tuple for kind in _alternatives(hint))


def _spoken(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list, each {_spoken(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(typing.get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}[kind]


@cache
def _hints(config: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}
