"""Where flags are and what they hold: dimensions per concept, sites, and the value of "on" at each site.

After "Efficient Representations are Controllable Representations" (arXiv 2602.07828): a concept that the output needs
sets its dimensions to a value that grows with depth, one that it does not need sets them to 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError, did_you_mean
from trimtab.lm import Site
from trimtab.lm.layouts import Layout, check_site

KINDS = ("resid_mid", "resid_post")
"""Sites of flags: after attention and after the MLP."""


@dataclass(frozen=True, kw_only=True)
class FlagSpec:
    """Flags of a model. Off is 0 everywhere; on is `targets`.

    Raises:
        UserError: there is no concept, one is named twice or has no dimension, a dimension is out of range or used
            twice, a site is not after attention or MLP, or a target is not above 0.
    """

    concepts: tuple[str, ...]
    dims: tuple[tuple[int, ...], ...]
    """Residual dimensions of each concept."""
    d_model: int
    """Width of the model's residual stream."""
    targets: Mapping[str, float]
    """What the dimensions of a concept that is on hold, in model units, by site in the order of the forward pass."""

    def __post_init__(self) -> None:
        check_concepts(self.concepts)
        if len(self.dims) != len(self.concepts):
            why = f"there are {len(self.concepts)} concepts"
            raise UserError(f"dimensions for {len(self.dims)} concepts", why, "give some for each concept")
        check_dims(self.concepts, self.dims)
        for concept, dims in zip(self.concepts, self.dims, strict=True):
            for dim in dims:
                if not 0 <= dim < self.d_model:
                    why = f"the model has dimensions 0 to {self.d_model - 1}"
                    raise UserError(f"dimension {dim} of {concept!r}", why, "choose one of them")
        if not self.targets:
            raise UserError("the flags", "they have no site", "begin at a lower layer")
        for name, target in self.targets.items():
            if Site.parse(name).kind not in KINDS:
                raise UserError(f"site {name}", f"flags are at {' and '.join(KINDS)}", "leave it out")
            if not 0 < target < math.inf:
                raise UserError(f"target {target} at {name}", "on must be above 0", "give another")

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """In the order of the forward pass."""
        return tuple(map(Site.parse, self.targets))

    @property
    def first_layer(self) -> int:
        """The first layer with flags."""
        return min(site.layer for site in self.sites)

    @property
    def flat_dims(self) -> list[int]:
        """All K dimensions, concept by concept."""
        return [dim for dims in self.dims for dim in dims]

    @property
    def concept_of(self) -> list[int]:
        """Index of the concept of each of `flat_dims`."""
        return [i for i, dims in enumerate(self.dims) for _ in dims]

    def labels(self, concepts: Sequence[Iterable[str]]) -> Float[Tensor, "N C"]:
        """1 for each concept that is named, 0 for the others; a row for each of several sets of names.

        Raises:
            UserError: there is no such concept.
        """
        rows = torch.zeros(len(concepts), len(self.concepts))
        for row, names in zip(rows, concepts, strict=True):
            for name in names:
                row[self.index(name)] = 1
        return rows

    def index(self, concept: str) -> int:
        """Number of a concept.

        Raises:
            UserError: there is no such concept.
        """
        if concept not in self.concepts:
            hint = did_you_mean(str(concept), self.concepts, "choose one of them")
            raise UserError(f"concept {concept!r}", f"the flags are {', '.join(self.concepts)}", hint)
        return self.concepts.index(concept)

    def check_fits(self, layout: Layout, d_model: int, name: str) -> None:
        """Raise a `UserError` unless a model has this width and these sites."""
        if d_model != self.d_model:
            why = f"{name} has {d_model}"
            raise UserError(f"flags in a stream of {self.d_model} dimensions", why, "take the flags of this model")
        for site in self.sites:
            check_site(layout, site, name)


def check_dims(concepts: Sequence[str], dims: Sequence[Sequence[int]]) -> None:
    """Raise a `UserError` unless each concept has dimensions of its own."""
    owner: dict[int, str] = {}
    for concept, each in zip(concepts, dims, strict=True):
        if not each:
            raise UserError(f"concept {concept!r}", "it has no dimension", "give it at least one")
        for dim in each:
            if dim in owner:
                why = f"it is a dimension of {owner[dim]!r}, too" if owner[dim] != concept else "it is named twice"
                raise UserError(f"dimension {dim} of {concept!r}", why, "use each dimension once")
            owner[dim] = concept


def check_concepts(concepts: Sequence[str]) -> None:
    """Raise a `UserError` unless there are concepts, each a text of its own."""
    if isinstance(concepts, str) or not concepts:
        raise UserError("the concepts", "they are a list of names", 'give them like ["sea", "war"]')
    for i, concept in enumerate(concepts):
        if not isinstance(concept, str) or not concept.strip():
            raise UserError(f"concept {concept!r}", "it is empty or no text", "give it a name")
        if concept in concepts[:i]:
            raise UserError(f"concept {concept!r}", "it is named twice", "name each once")
