"""From the flat fields of a `TrainConfig` to an architecture's own config, by the fields' names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from typing import Any

from trimtab.dictionaries.architectures import TRAINABLE, trainable_class
from trimtab.dictionaries.topk_like import check_active
from trimtab.dictionaries.trainable import TrainableConfig
from trimtab.errors import UserError, did_you_mean
from trimtab.runs import field_types

SPARSITY = ("l0", "k", "sparsity_weight")
"""Fields that say how sparse codes become."""


def fields_of(arch: str) -> Set[str]:
    """Names of the fields that an architecture's config has."""
    return field_types(trainable_class(arch).config_class).keys()


def architecture_fields() -> Set[str]:
    """Names of all fields of any architecture's config."""
    return {name for arch in TRAINABLE for name in fields_of(arch)} | set(SPARSITY)


def architecture_config(flat: Mapping[str, Any], l0: float | None, dead_after: int) -> TrainableConfig:
    """The config of an architecture, out of the fields of a `TrainConfig` that are set.

    Args:
        flat: the `TrainConfig`'s fields by name.
        l0: active features per row to aim at, if any.
        dead_after: rows without firing after which a feature is dead.

    Raises:
        UserError: no such architecture, a field that it lacks, or a value that it refuses.
    """
    arch = flat["arch"]
    kind = trainable_class(arch).config_class
    hints, known = field_types(kind), architecture_fields() - {"l0"}
    given = {name: value for name, value in flat.items() if name in known and value is not None}
    given["dead_after"] = dead_after
    if l0 is not None:
        if "l0" in hints:
            given["l0"] = l0
        else:
            if flat["n_features"] > 0:  # else that is what is wrong, and the architecture says so
                check_active("l0", l0, flat["n_features"])
            given["k"] = _whole(l0, arch) if hints["k"] is int else l0
    for name in given:
        if name not in hints:
            raise UserError(f"{name} {given[name]}", f"architecture {arch} has no {name}", _instead(name, hints))
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
    return did_you_mean(name, hints, "leave it out")
