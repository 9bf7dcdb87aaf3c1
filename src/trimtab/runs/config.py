"""Configs as plain values: what `run.json` holds, and where two of them differ."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

LEFT_OUT_AT_DEFAULT = {"left_out_at_default": True}
"""Metadata of a dataclass field that was added later: it stands in the plain config only where it is not the default,
so that runs made before are those of the same config."""


class FieldDifference(NamedTuple):
    """A field that two configs do not share."""

    field: str
    """Dotted name, such as `decoding.temperature`."""
    old: Any
    """Value in the first; `ABSENT` if it has no such field."""
    new: Any
    """Value in the second; `ABSENT` if it has no such field."""

    def __str__(self) -> str:
        return f"{self.field} was {_short(self.old)} and is now {_short(self.new)}"


class _Absent(enum.Enum):
    ABSENT = "absent"

    def __repr__(self) -> str:
        return self.value


ABSENT = _Absent.ABSENT
"""Stands for the value of a field that is not there."""


def config_dict(config: Any) -> dict[str, Any]:
    """A config (dataclass or mapping) as a dict that survives JSON unchanged.

    Paths become text, tuples lists, enums their values, infinities and NaN the words "inf", "-inf", "nan";
    a nested dataclass says its class under `type`, so that two kinds with equal fields differ. Fields that are marked
    with `LEFT_OUT_AT_DEFAULT` are left out at their default.

    Raises:
        TypeError: a value of a type that has no plain form.
    """
    plain = _plain(config, for_config=True)
    if not isinstance(plain, dict):
        raise TypeError(f"a config is a dataclass or a mapping, not {type(config).__name__}")
    fields = cast(dict[str, Any], plain)
    if dataclasses.is_dataclass(config) and "type" not in {f.name for f in dataclasses.fields(config)}:
        del fields["type"]
    return fields


def part_of(config: Any, kind: type[Any]) -> dict[str, Any]:
    """The values of those fields that a dataclass has, out of a config that is made of it and more."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(kind)}


def config_directory(command: str, config: Any, *, ignore: Collection[str]) -> Path:
    """Where the run of a config goes unless it says so: the same config always finds its own run.

    Args:
        command: what the directory's name begins with.
        config: a dataclass or mapping.
        ignore: fields that do not change the result.
    """
    plain = {name: value for name, value in config_dict(config).items() if name not in ignore}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return Path("runs") / f"{command}-{digest[:8]}"


def json_safe(value: Any) -> Any:
    """`value` with dataclasses, paths, tuples and numpy values made plain; infinities and NaN become None.

    Raises:
        TypeError: a value of a type that has no plain form.
    """
    return _plain(value, for_config=False)


def config_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], *, ignore: Collection[str] = ()
) -> list[FieldDifference]:
    """The fields in which two plain configs differ, in the order of `old`, then those only in `new`.

    Args:
        old, new: results of `config_dict`, or what was read back from JSON.
        ignore: dotted fields left out, with all below them.
    """
    different = _differences(old, new, "")
    return [d for d in different if not any(f"{d.field}.".startswith(f"{field}.") for field in ignore)]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> list[FieldDifference]:
    found: list[FieldDifference] = []
    for key in [*old, *(key for key in new if key not in old)]:
        before: Any = old.get(key, ABSENT)
        after: Any = new.get(key, ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            below = cast(Mapping[str, Any], before), cast(Mapping[str, Any], after)
            found += _differences(*below, f"{prefix}{key}.")
        elif isinstance(before, bool) or isinstance(after, bool):
            found += [FieldDifference(prefix + key, before, after)] * (before is not after)
        elif before != after:
            found.append(FieldDifference(prefix + key, before, after))
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"


def _plain(value: Any, *, for_config: bool) -> Any:
    if isinstance(value, enum.Enum):
        return _plain(value.value, for_config=for_config)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return _plain(cast(Any, value).tolist(), for_config=for_config)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return str(float(value)) if for_config else None
    if isinstance(value, os.PathLike):
        return os.fspath(cast(os.PathLike[str], value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        marked = {f for f in dataclasses.fields(value) if for_config and f.metadata.get("left_out_at_default")}
        present = [f for f in dataclasses.fields(value) if f not in marked or getattr(value, f.name) != f.default]
        fields = {f.name: _plain(getattr(value, f.name), for_config=for_config) for f in present}
        return {"type": type(value).__name__, **fields} if for_config else fields
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {str(key): _plain(item, for_config=for_config) for key, item in items}
    if isinstance(value, list | tuple):
        return [_plain(item, for_config=for_config) for item in cast(list[Any], value)]
    if isinstance(value, set | frozenset):
        return sorted(_plain(item, for_config=for_config) for item in cast(set[Any], value))
    raise TypeError(f"{type(value).__name__} has no plain form: {value!r}")
