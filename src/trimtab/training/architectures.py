"""From the flat fields of a `TrainConfig` to an architecture's own config, by the fields' names."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Collection, Set
from functools import cache
from typing import TYPE_CHECKING, Any

from trimtab.dictionaries.registry import TRAINABLE
from trimtab.dictionaries.topk_training import check_active
from trimtab.dictionaries.trainable import TrainableConfig, TrainableSAE
from trimtab.errors import UserError

if TYPE_CHECKING:
    from trimtab.training.config import TrainConfig

SPARSITY = ("l0", "k", "sparsity_weight")
"""Fields that say how sparse codes become."""


def trainable_class(name: object) -> type[TrainableSAE]:
    """The training class of an architecture.

    Raises:
        UserError: there is none of that name.
    """
    if isinstance(name, str) and name in TRAINABLE:
        return TRAINABLE[name]
    close = difflib.get_close_matches(str(name), TRAINABLE, n=1)
    raise UserError(
        f"arch {name!r}",
        f"it is one of {', '.join(sorted(TRAINABLE))}",
        f"did you mean {close[0]}?" if close else "choose one",
    )


def fields_of(arch: str) -> Set[str]:
    """Names of the fields that an architecture's config has."""
    return _hints(trainable_class(arch).config_class).keys()


def architecture_fields() -> Set[str]:
    """Names of all fields of any architecture's config."""
    return {name for arch in TRAINABLE for name in fields_of(arch)} | set(SPARSITY)


def architecture_config(config: TrainConfig, l0: float | None, dead_after: int) -> TrainableConfig:
    """The config of an architecture, out of the fields of a `TrainConfig` that are set.

    Args:
        config: the flat config.
        l0: active features per row to aim at, if any.
        dead_after: rows without firing after which a feature is dead.

    Raises:
        UserError: no such architecture, a field that it lacks, or a value that it refuses.
    """
    kind = trainable_class(config.arch).config_class
    hints = _hints(kind)
    flat = {field.name for field in dataclasses.fields(config)}
    said = {name: getattr(config, name) for name in flat & architecture_fields() - {"l0"}}
    given: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    given["dead_after"] = dead_after
    if l0 is not None:
        if "l0" in hints:
            given["l0"] = l0
        else:
            if config.n_features > 0:  # else that is what is wrong, and the architecture says so
                check_active("l0", l0, config.n_features)
            given["k"] = _whole(l0, config.arch) if hints["k"] is int else l0
    for name in given:
        if name not in hints:
            raise UserError(f"{name} {given[name]}", f"architecture {config.arch} has no {name}", _instead(name, hints))
    return kind(**given)


def _whole(l0: float, arch: str) -> int:
    if l0 != round(l0):
        raise UserError(f"l0 {l0:g}", f"{arch} keeps a whole number of features per row", "round it")
    return round(l0)


def _instead(name: str, hints: Collection[str]) -> str:
    if name == "k":
        return "give l0"
    if name == "sparsity_weight":
        return "give l0 or k"
    close = difflib.get_close_matches(name, hints, n=1)
    return f"leave it out, or did you mean {close[0]}?" if close else "leave it out"


@cache
def _hints(kind: type[TrainableConfig]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
