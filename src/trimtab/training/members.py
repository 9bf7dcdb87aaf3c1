"""Members of a bank: products of lists, one config and one name each."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.dictionaries.architectures import TRAINABLE, trainable_class
from trimtab.errors import UserError
from trimtab.training.config import DEFAULT_L0, Recipe, TrainConfig
from trimtab.training.options import SPARSITY, architecture_fields, fields_of

DEFAULT_SITE = "resid_post.15"
MULTIPLIED = ("site", "arch", "n_features", *SPARSITY, "batch_size", "lr", "seed")
"""Fields of which the command line takes several values."""
_LONGEST_NAME = 120
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


@dataclass(frozen=True)
class Member:
    """One SAE of a bank."""

    name: str
    """Says what is trained, and is the name of the member's directory."""
    site: str
    values: Mapping[str, Any]
    """The fields that were set."""
    config: TrainConfig | None
    """None if the values make no config."""
    error: UserError | None = None
    """Why there is no config."""


def expand(
    inherited: Mapping[str, Sequence[Any]], own: Iterable[tuple[str, Mapping[str, Sequence[Any]]]] = (("", {}),)
) -> list[Member]:
    """All combinations of values.

    A member's own values replace the inherited ones; if it says anything about sparsity (`l0`, `k`, `sparsity_weight`),
    it says all of it. Inherited fields of other architectures are left out, own ones are an error.

    Args:
        inherited: values to combine, by field of `TrainConfig` or `site`.
        own: further values of one member or a group of members, with the place that messages name.

    Raises:
        UserError: an architecture or field that does not exist, or two equal members.
    """
    members: list[Member] = []
    places: list[str] = []
    used: set[str] = set()
    for place, values in own:
        dense = {name: value for name, value in inherited.items() if name not in SPARSITY}
        sparse = {name: value for name, value in inherited.items() if name in SPARSITY}
        combined = {**dense, **({} if any(name in values for name in SPARSITY) else sparse), **values}
        for choice in itertools.product(*combined.values()):
            member = dict(zip(combined, choice, strict=True))
            arch = member.get("arch", _DEFAULTS["arch"])
            try:
                trainable_class(arch)
            except UserError as error:
                raise UserError(f"{place}{error.what}", error.why, error.hint) from error
            others = set(architecture_fields()) - set(fields_of(arch)) - set(SPARSITY)  # fields of other architectures
            lacking = {name for name in others if member.get(name) is not None}
            for name in lacking & set(values):
                raise UserError(
                    f"{place}{name}", f"architecture {arch} has no {name}", "leave it out, or choose another arch"
                )
            used |= set(member) - lacking
            told = {n for n in combined if n in values or len(combined[n]) > 1} - lacking
            members.append(_member({name: value for name, value in member.items() if name not in lacking}, told))
            places.append(place)
    if unused := set(inherited) - used - set(SPARSITY):
        name = sorted(unused)[0]
        having = ", ".join(arch for arch in TRAINABLE if name in fields_of(arch))
        raise UserError(f"{name} {inherited[name][0]}", f"only {having} has it", "leave it out, or choose another arch")
    names: set[str] = set()
    configs: set[tuple[str, TrainConfig]] = set()
    for place, member in zip(places, members, strict=True):
        config = {(member.site, member.config)} if member.config else set()
        if member.name in names or config & configs:
            raise UserError(f"{place}member {member.name}", "it is there twice", "name each combination once")
        names.add(member.name)
        configs |= config
    return members


def _member(values: Mapping[str, Any], told: set[str]) -> Member:
    site = str(values.get("site", DEFAULT_SITE))
    fields = {name: value for name, value in values.items() if name != "site"}
    try:
        config = TrainConfig(**fields)
    except UserError as error:
        unset = fields.get("sparsity_weight") is None
        wanted = (fields.get("l0") or fields.get("k") or DEFAULT_L0) if unset else None
        return Member(_name(site, fields, wanted, told), site, values, None, error)
    return Member(_name(site, fields, config.l0_target, told), site, values, config)


def _name(site: str, fields: Mapping[str, Any], l0: float | None, told: set[str]) -> str:
    """Site, architecture, size, sparsity, seed, and whatever else tells the member from others."""
    of = {name: fields.get(name, default) for name, default in _DEFAULTS.items()}
    parts = [site, of["arch"], f"n{of['n_features']}"]
    if l0 is not None:
        parts.append(f"l0_{l0:g}")
    if of["sparsity_weight"] is not None:
        parts.append(f"weight{_plain(of['sparsity_weight'])}")
    parts.append(f"seed{of['seed']}")
    parts += [f"{name}{_plain(of[name])}" for name in sorted(told - {"site", "arch", "n_features", "seed", *SPARSITY})]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(map(str, parts)))
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _plain(value: Any) -> str:
    return "_".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


_RECIPE = tuple(field.name for field in dataclasses.fields(Recipe))


def chosen(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that are not at their defaults."""
    return {name: getattr(recipe, name) for name in _RECIPE if getattr(recipe, name) != _DEFAULTS[name]}
