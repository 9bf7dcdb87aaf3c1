"""Options that are stated elsewhere: those of each architecture's config, and several values of one option.

What an architecture's file states becomes an option of `trimtab train`, of bank files and of `evaluate ground-truth`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

from typing_extensions import Doc

from trimtab.dictionaries.architectures import TRAINABLE, trainable_class
from trimtab.dictionaries.topk_like import check_active
from trimtab.dictionaries.trainable import TrainableConfig
from trimtab.errors import UserError, did_you_mean
from trimtab.runs import field_docs, field_types

SPARSITY = ("l0", "k", "sparsity_weight")
"""Fields that say how sparse codes become."""
STATED = {"n_features", "dead_after", "precision", *SPARSITY}
"""Fields of architectures' configs that a `TrainConfig` states itself, with one meaning for all."""

_Config = TypeVar("_Config")


class Option(NamedTuple):
    """A field to add to a config."""

    name: str
    kind: Any
    doc: str
    default: Any = None
    metadata: Mapping[str, Any] = {}


def with_options(options: Iterable[Option]) -> Callable[[type[_Config]], type[_Config]]:
    """A decorator that adds fields to a frozen dataclass."""

    def extended(config: type[_Config]) -> type[_Config]:
        about = {name: getattr(config, name) for name in ("__module__", "__qualname__", "__doc__")}
        added = []
        for o in options:
            if o.name in field_types(config):
                raise TypeError(f"{config.__name__} has a field {o.name}; give the architecture's option another name")
            added.append(
                (o.name, Annotated[o.kind, Doc(o.doc)], dataclasses.field(default=o.default, metadata=o.metadata))
            )
        return dataclasses.make_dataclass(
            config.__name__, added, bases=(config,), namespace=about, frozen=True, kw_only=True
        )

    return extended


def architecture_options(**metadata: Any) -> list[Option]:
    """Every architecture's options, each None unless it is given; all with this metadata beside their own."""
    found: dict[str, Option] = {}
    for arch, cls in TRAINABLE.items():
        kinds, docs = field_types(cls.config_class), field_docs(cls.config_class)
        for field in dataclasses.fields(cls.config_class):
            if field.name in STATED:
                continue
            if field.default is dataclasses.MISSING:
                raise TypeError(f"option {field.name} of architecture {arch} needs a default")
            having = [other for other in sorted(TRAINABLE) if field.name in fields_of(other)]
            whose = "" if len(having) == len(TRAINABLE) else f"{', '.join(having)}: "
            usual = "" if field.default is None else f" By default {field.default}."
            doc = f"{whose}{docs.get(field.name, '')}{usual}"
            about = {**field.metadata, **metadata, "heading": "architecture"}
            option = Option(field.name, kinds[field.name] | None, doc, metadata=about)
            if found.setdefault(field.name, option).kind != option.kind:
                raise TypeError(f"option {field.name} of architecture {arch} has another type in {having[0]}")
    return list(found.values())


def several(config: type[Any], names: Iterable[str]) -> list[Option]:
    """Options of which several values may be given: a config's fields as tuples."""
    kinds, docs = field_types(config), field_docs(config)
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    found = []
    for name in names:
        kind = next((part for part in get_args(kinds[name]) if part is not type(None)), kinds[name])
        default = () if usual[name] is None else (usual[name],)
        found.append(Option(name, tuple[kind, ...], f"{docs[name].removesuffix('.')}; several make a bank.", default))
    return found


def fields_of(arch: str) -> Set[str]:
    """Names of the fields that an architecture's config has."""
    return field_types(trainable_class(arch).config_class).keys()


def architecture_fields() -> Set[str]:
    """Names of all fields of any architecture's config."""
    return {name for arch in TRAINABLE for name in fields_of(arch)} | set(SPARSITY)


def architecture_config(flat: Mapping[str, Any], l0: float | None, dead_after: int) -> TrainableConfig:
    """The config of an architecture, out of the fields of a `TrainConfig` that are set, for an L0 to aim at, if any.

    Raises a `UserError` for an architecture that does not exist, a field that it lacks, or a value that it refuses.
    """
    arch = flat["arch"]
    kind = trainable_class(arch).config_class
    kinds, known = field_types(kind), architecture_fields()
    given = {name: value for name, value in flat.items() if name in known and value is not None}
    given["dead_after"] = dead_after
    if l0 is not None and "l0" in kinds:
        given["l0"] = l0
    elif l0 is not None and "k" in kinds:
        if flat["n_features"] > 0:  # else that is what is wrong, and the architecture says so
            check_active("l0", l0, flat["n_features"])
        given.pop("l0", None)
        if kinds["k"] is int and l0 != round(l0):
            raise UserError(f"l0 {l0:g}", f"{arch} keeps a whole number of features per row", "round it")
        given["k"] = kinds["k"](l0)
    for name in given:
        if name not in kinds:
            instead = {"k": "give l0", "sparsity_weight": "give l0 or k"}.get(name)
            fix = instead or did_you_mean(name, kinds, "leave it out")
            raise UserError(f"{name} {given[name]}", f"architecture {arch} has no {name}", fix)
    return kind(**given)
