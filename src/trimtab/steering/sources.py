"""Sources that steer with given directions, at one site or several: what they share, and doses that stay the same."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict, TypeVar, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.dictionaries.base import Dictionary, check_is_dictionary
from trimtab.errors import UserError, check_one_of
from trimtab.lm import DecodeStart, Edit, EditRequest, LanguageModel, PositionRule, Site, edit_delta
from trimtab.lm.layouts import head_count
from trimtab.lm.sites import HEAD_KINDS
from trimtab.runs import known_arguments, plain, whole_numbers
from trimtab.steering.direction_table import DirectionTable, as_vector
from trimtab.steering.doses import DEFAULT_DOSE, DEFAULT_UNIT, check_doses, check_unit
from trimtab.steering.operations import Slots, operation_named

T = TypeVar("T")
PerSite = T | Mapping[Site | str, T] | Mapping[Site, T] | Mapping[str, T]
"""One value for all sites, or each site's own."""


class Choice(NamedTuple):
    """Features and their doses, one row per edited token."""

    feature: Int[Tensor, "R K"]  # -1 for an empty slot
    dose: Float[Tensor, "R K"]


class DirectionBlock(NamedTuple):
    """A range of a source's directions that share what a trace says about them."""

    start: int
    n: int
    unit: str
    operation: str
    dictionary_hash: str
    replaces: bool = False  # the activation as a whole, so that it is one direction that adds nothing


class SourceOptions(TypedDict, total=False):
    """Keyword arguments of every source of directions; `DirectionSource` says what they mean."""

    unit: str
    operation: str
    positions: PositionRule | str | Sequence[int]
    combine: str


@known_arguments
class DirectionSource:
    """What all sources with tables of directions share. Subclasses implement `pick`.

    Args:
        directions: a dictionary, or any table of directions; or one for each of several sites.
        site: where to steer; the site that the dictionary names by default.
        unit: `relative`, `max_activation` or `absolute`; what it means is in `trimtab.steering.doses`. `ablate` and
            `scale` have no use for it.
        operation: `add`, `ablate`, `clamp`, `scale`, `overwrite`; what they do is in `trimtab.steering.operations`.
        positions: `generated`, `prompt`, `all`, `START:STOP`, positions such as `[3, 7]`, or a rule.
        combine: how several features at one token share a dose. `each` gives every feature its own dose, so that ‖Δ‖
            depends on the angles between them. `total` scales them by one factor so that ‖Δ‖ is the mean of their
            lengths, which keeps doses comparable between sources. Only for `add`.

    Raises:
        UserError: something is not one of the allowed values, the site is unknown, or statistics are missing.
    """

    def __init__(
        self,
        directions: PerSite[Dictionary | DirectionTable],
        site: Site | str | None = None,
        *,
        unit: str = DEFAULT_UNIT,
        operation: str = "add",
        positions: PositionRule | str | Sequence[int] = "generated",
        combine: str = "each",
    ) -> None:
        _check_no_name(directions)
        self.how = operation_named(operation)
        check_one_of("combine", combine, ("each", "total"))
        if operation != "add" and combine != "each":
            raise UserError(f"combine {combine}", "only doses that are added can be shared", "use operation add")
        self.tables = {
            at: found if isinstance(found, DirectionTable) else DirectionTable.of(found)
            for at, found in by_site(directions, site).items()
        }
        for table in self.tables.values() if self.how.unit is None else ():
            check_unit(unit, has_statistics=table.max_activation is not None)
            if table.length is not None and unit != "absolute":
                raise UserError(f"unit {unit}", "the vectors are to keep their own length", "use unit absolute")
        self.sites = tuple(self.tables)
        self.positions = self.where = PositionRule.parse(positions)
        self.unit = self.how.unit or unit
        self.operation, self.combine = self.how.name, combine
        self.dictionary_hash = "+".join(dict.fromkeys(table.hash for table in self.tables.values()))

    def __repr__(self) -> str:
        where = ", ".join(map(str, self.sites))
        return f"<{type(self).__name__}: {self.operation} at {where}, positions {self.where}>"

    @property
    def table(self) -> DirectionTable:
        """The directions of a source with one site."""
        (table,) = self.tables.values()
        return table

    def directions(self, site: Site) -> Float[Tensor, "n d"]:
        """The table's unit rows."""
        return self.tables[site].rows

    def blocks(self, site: Site) -> tuple[DirectionBlock, ...]:
        """All rows at a site are of one kind."""
        table = self.tables[site]
        return (DirectionBlock(0, table.n, self.unit, self.operation, table.hash),)

    def start(self, start: DecodeStart) -> None:
        """Move the directions to where decoding happens."""
        self.where.check(start.prompts, start.n_inputs)
        for table in self.tables.values():
            table.to(start.device)

    def choose(self, request: EditRequest) -> Edit | None:
        """Edits for one forward pass, from what `pick` chooses."""
        table = self.tables[request.site]
        if request.x.shape[-1] != table.width:
            raise UserError(
                f"directions of width {table.width}",
                f"site {request.site} has width {request.x.shape[-1]}",
                "choose a dictionary trained at this site of this model",
            )
        choice = self.pick(request)
        return None if choice is None else self.edit(request.x, choice, table)

    def pick(self, request: EditRequest) -> Choice | None:
        """Features and doses for the rows of one forward pass."""
        raise NotImplementedError

    def edit(self, x: Float[Tensor, "R d"], choice: Choice, table: DirectionTable) -> Edit:
        """The edit that a choice means for activations `x`, under this source's operation, unit and sharing."""
        feature, dose = choice
        if self.operation != "add" and feature.shape[1] > 1:
            check_each_once(feature, table)
        at = Slots(x, feature, dose, self.unit, table)
        coefficient = self.how.coefficients(at)
        if self.combine == "total":
            coefficient = share_dose(table.rows, feature, coefficient)
        if not self.how.has_dose:
            dose = torch.zeros_like(dose)
        filled = feature >= 0
        target = torch.where(filled & table.are_axes(feature), at.length, torch.nan) if self.how.sets else None
        return Edit(feature, torch.where(filled, coefficient, 0), torch.where(filled, dose, 0), target=target)


def _check_no_name(directions: object) -> None:
    """Refuse a dictionary's name in its place."""
    if isinstance(directions, str | os.PathLike):
        check_is_dictionary(directions)


def by_site(given: PerSite[T], site: Site | str | None) -> dict[Site, T]:
    """What is given for each of several sites, or for the one that is named or that a dictionary reads.

    Raises:
        UserError: no site is named, or one is although what is given names its own.
    """
    if not isinstance(given, Mapping):
        dictionary = given.dictionary if isinstance(given, DirectionTable) else given
        site = site or (dictionary.info.site if hasattr(dictionary, "info") else "")  # type: ignore[union-attr]
        if not site:
            raise UserError(
                "the site", "the directions do not name the one they are for", "give a site (--site resid_post.15)"
            )
        return {Site.parse(site): given}
    if not given:
        raise UserError("the sites", "there are none", "name at least one")
    if site:
        raise UserError(f"site {site}", "the directions name their own", "leave it out")
    return {Site.parse(name): value for name, value in given.items()}


def for_each(sites: Sequence[Site], given: PerSite[T], name: str) -> dict[Site, T]:
    """What holds at each of some sites, which are all that it may be given for."""
    found = by_site(given, None) if isinstance(given, Mapping) else dict.fromkeys(sites, given)
    if found.keys() != set(sites):
        asked, known = (", ".join(map(str, each)) for each in (sites, found))
        raise UserError(f"{name} for {known}", f"the directions are for {asked}", f"give {name} for each of these")
    return found


def share_dose(
    directions: Float[Tensor, "n d"], feature: Int[Tensor, "R K"], coefficient: Float[Tensor, "R K"]
) -> Float[Tensor, "R K"]:
    """Coefficients scaled by one factor per row so that ‖Δ‖ is the mean of their lengths over filled slots."""
    filled = feature >= 0
    length = torch.where(filled, coefficient.abs(), 0).sum(-1) / filled.sum(-1).clamp_min(1)
    total = edit_delta(directions, Edit(feature, coefficient)).norm(dim=-1)
    return coefficient * torch.where(total > 0, length / total, 0)[:, None]


class StaticSource(DirectionSource):
    """The same features at the same doses at every edited token, for all rows or for each row its own.

    Args:
        directions: a dictionary, or any table of directions; or one for each of several sites.
        features: one id, several for every row, or a tensor `[N, K]` with each row's own (−1 for an empty slot); or
            those of each site.
        doses: one number, one per feature, or a tensor `[N, K]` or `[N, 1]` with each row's own; or those of each site.
        site, options: as in `DirectionSource`.

    Raises:
        UserError: also if a feature does not exist or a dose is not finite; unless doses are added, if a feature is
            named twice for one row or its direction is zero.
    """

    def __init__(
        self,
        directions: PerSite[Dictionary | DirectionTable],
        features: PerSite[int | Sequence[int] | Int[Tensor, "N K"]],
        doses: PerSite[float | Sequence[float] | Float[Tensor, "N K"]] = DEFAULT_DOSE,
        site: Site | str | None = None,
        **options: Unpack[SourceOptions],
    ) -> None:
        super().__init__(directions, site, **options)
        feature, dose = for_each(self.sites, features, "features"), for_each(self.sites, doses, "doses")
        add = self.operation == "add"
        self.choices = {at: _choice(feature[at], dose[at], table, add) for at, table in self.tables.items()}

    @property
    def asks_nothing(self) -> bool:
        """Whether edits come from tensors alone; see `InterventionSource`."""
        own = type(self) in (StaticSource, VectorSource)  # what others choose is not known
        return own and self.operation == "add"  # other operations read codes, whose sizes depend on what fires

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        for site, (feature, dose) in self.choices.items():
            if feature.shape[0] not in (1, len(start.prompts)):
                raise UserError(
                    f"features for {feature.shape[0]} rows", f"{len(start.prompts)} rows are decoded", "give one each"
                )
            self.choices[site] = Choice(feature.to(start.device), dose.to(start.device))

    def join(self, start: DecodeStart) -> None:
        """Rows that join are steered as all others are."""
        self.where.check(start.prompts, start.n_inputs)
        if any(len(feature) != 1 for feature, _ in self.choices.values()):
            raise UserError(
                "a row that joins a stream in which each row has features of its own",
                "there are none for it",
                "give features for all rows alike, or add the row before the first step",
            )

    def pick(self, request: EditRequest) -> Choice:
        feature, dose = self.choices[request.site]
        if feature.shape[0] == 1:
            rows = len(request.row)
            return Choice(feature.expand(rows, -1), dose.expand(rows, -1))
        return Choice(feature[request.row], dose[request.row])


def _choice(
    features: int | Sequence[int] | Tensor, doses: float | Sequence[float] | Tensor, table: DirectionTable, add: bool
) -> Choice:
    check_doses(doses)
    feature = torch.atleast_2d(feature_ids(features, table.n))
    dose = torch.atleast_2d(torch.as_tensor(doses, dtype=torch.get_default_dtype()))
    if not add:
        check_each_once(feature, table)
    count, n_doses = feature.shape[-1], dose.shape[-1]
    if n_doses not in (1, count) or len({1, len(feature), len(dose)}) > 2:
        raise UserError(f"{n_doses} doses", f"there are {count} features", "give one dose, or one for each")
    return Choice(*torch.broadcast_tensors(feature, dose))


class VectorSource(StaticSource):
    """A constant dose of any vector: a difference of means, a probe's direction, a supervised feature.

    Args:
        vectors: `[d]` or `[n, d]`, or at attention sites without a head `[heads, head_dim]` or
            `[n, heads, head_dim]`; or those of each site. Only the direction counts, the dose gives the length.
        site: where to steer, unless the vectors say so.
        doses: one number, or one per vector; or those of each site. With `keep_length` 1 by default.
        max_activation: `[n]` largest projection of real activations, if doses are in `max_activation`.
        keep_length: doses are multiples of each vector as it is: a dose of 1 adds the vector (to rounding).
        options: as in `DirectionSource`.

    Raises:
        UserError: also if a vector is zero or not finite; while decoding, if vectors of all heads do not fit them.
    """

    def __init__(
        self,
        vectors: PerSite[Float[Tensor, "n d"] | Float[Tensor, " d"]],
        site: Site | str | None = None,
        doses: PerSite[float | Sequence[float]] | None = None,
        *,
        max_activation: PerSite[Float[Tensor, " n"] | None] = None,
        keep_length: bool = False,
        **options: Unpack[SourceOptions],
    ) -> None:
        if keep_length:
            options.setdefault("unit", "absolute")
        given = {at: as_vector(found) for at, found in by_site(vectors, site).items()}
        self.heads = head_shapes(given)
        most = for_each(tuple(given), max_activation, "max_activation")
        tables = {
            at: vector_table(found, at, max_activation=most[at], keep_length=keep_length) for at, found in given.items()
        }
        features = {at: range(table.n) for at, table in tables.items()}
        default = 1.0 if keep_length else DEFAULT_DOSE
        super().__init__(tables, features, default if doses is None else doses, **options)

    def start(self, start: DecodeStart) -> None:
        check_heads(start.model, self.heads)
        super().start(start)


def head_shapes(values: Mapping[Site, Tensor]) -> dict[Site, tuple[int, ...]]:
    """Number and width of the heads where values are cut into all heads of a layer."""
    cut = {site: value for site, value in values.items() if site.kind in HEAD_KINDS and site.head is None}
    return {site: tuple(value.shape[-2:]) for site, value in cut.items() if value.ndim > 1}


def check_heads(model: LanguageModel | None, heads: Mapping[Site, tuple[int, ...]]) -> None:
    """Refuse values of all heads that are cut into other heads than the model's."""
    for site, shape in heads.items():
        if model is None:
            return
        layer = model.layout.layers[model.site(site).layer]
        assert layer.attention is not None
        own = (head_count(layer, site), layer.attention.head_dim)
        if shape != own:
            raise UserError(
                f"values of {site} for {shape[0]} heads of {shape[1]}",
                f"{model.name} has {own[0]} heads of {own[1]} there",
                "give those of this site",
            )


def vector_table(
    vectors: Tensor,
    site: Site,
    *,
    width: int | None = None,
    max_activation: Float[Tensor, " n"] | None = None,
    keep_length: bool = False,
) -> DirectionTable:
    """Vectors as directions at a site.

    Args:
        vectors: one or several, as `VectorSource` takes them; of any shape whose last dimensions together hold the
            width, if that is known.
        site: where they steer.
        width: of the site.
        max_activation, keep_length: as in `DirectionTable`.

    Raises:
        UserError: the shape does not fit, or a vector is zero or not finite.
    """
    values = as_vector(vectors)
    if width is None:
        # At all heads of a layer a vector has the shape [heads, head_dim].
        own = 2 if site.kind in HEAD_KINDS and site.head is None and values.ndim > 1 else 1
        rows = values.reshape(-1, values.shape[-own:].numel()) if values.ndim <= own + 1 else values
    elif width in (values.shape[-own:].numel() for own in range(1, values.ndim + 1)):
        rows = values.reshape(-1, width)
    else:
        shape = "×".join(map(str, values.shape)) or "()"
        raise UserError(
            f"a vector of shape {shape}", f"site {site} has width {width}", "give [width], or [n, width] for several"
        )
    if bool((rows == 0).all(dim=-1).any()):
        raise UserError("a steering vector", "it is zero, so it has no direction", "give another")
    return DirectionTable(rows, max_activation=max_activation, keep_length=keep_length)


def check_each_once(feature: Int[Tensor, "R K"], table: DirectionTable) -> None:
    """Refuse what only adding has a meaning for: a feature twice at one activation, or one without a direction."""
    ids = feature.sort(dim=1).values
    twice = ids[:, 1:][(ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)]
    if len(twice):
        raise UserError(f"feature {int(twice[0])}", "it is named twice for one row", "name each once")
    named = feature[feature >= 0]
    dead = named[(table.rows[named.to(table.rows.device)] == 0).all(dim=1).to(named.device)]
    if len(dead):
        raise UserError(f"feature {int(dead[0])}", "its direction is zero, so it cannot be set", "leave it out")


def _checked(given: int | Sequence[int]) -> int | list[int]:
    """Ids as torch reads them, once none is a text or a fraction."""
    whole_numbers(given, "feature")
    return plain(given)


def feature_ids(given: int | Sequence[int] | Tensor, n: int, lowest: int = -1) -> Tensor:
    """Ids as a tensor.

    Raises:
        UserError: an id is not a whole number, or not one of `n` features (or −1, if that is the lowest allowed).
    """
    ids = given if isinstance(given, Tensor) else torch.as_tensor(_checked(given))
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise UserError(f"feature {ids.flatten()[0].item()}", "features are whole numbers", "give ids like 3")
    ids = ids.long()
    bad = ids[(ids < lowest) | (ids >= n)]
    if len(bad):
        raise UserError(f"feature {int(bad[0])}", f"the dictionary has features 0 to {n - 1}", "choose one of them")
    return ids
