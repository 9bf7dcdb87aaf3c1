"""What a run of `policy train` was configured with, read back from its `run.json`."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from trimtab.errors import UserError
from trimtab.policies.config import PolicyConfig
from trimtab.runs import read_record

COMMAND = "policy train"
_Config = TypeVar("_Config")


def read_policy_config(run: str | os.PathLike[str]) -> PolicyConfig:
    """The config of a run of `policy train`, its directory being where it lies now.

    Raises:
        UserError: there is no run, it is another command's, or it was written by another version.
    """
    record = read_record(run)
    if record["command"] != COMMAND:
        raise UserError(
            f"run {run}", f"it belongs to `{record['command']}`, not `{COMMAND}`", "name a run of `policy train`"
        )
    try:
        return dataclasses.replace(from_plain(PolicyConfig, record["config"]), run=Path(run))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"run {run}", f"its config is not one of this version ({error})", "use the version that wrote it"
        ) from error


def from_plain(kind: type[_Config], values: Mapping[str, Any]) -> _Config:
    """A config dataclass from the plain values that `config_dict` made of it.

    Raises:
        TypeError: a field that the dataclass does not have.
        ValueError: a value that does not fit its field.
    """
    hints = typing.get_type_hints(kind)
    given = {name: value for name, value in values.items() if name != "type" or "type" in hints}
    if unknown := sorted(set(given) - set(hints)):
        raise TypeError(f"it has a field {unknown[0]}")
    return kind(**{name: _typed(hints[name], value) for name, value in given.items()})


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type[Any], hint), value)
    if typing.get_origin(hint) is tuple:
        return tuple(_typed(typing.get_args(hint)[0], part) for part in value)
    if hint is Path:
        return Path(value)
    return float(value) if hint is float else value
