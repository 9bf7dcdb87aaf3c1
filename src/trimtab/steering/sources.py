"""Sources that steer with given directions: constant per row, scheduled by a function, or a vector of one's own.

What a choice of features and doses does to an activation is decided here once, by the operation:

- `add` adds the dose along each feature's unit direction;
- `clamp` sets the feature's code, so that it contributes the dose;
- `ablate` sets the code to 0;
- `scale` multiplies the code by the dose.

The last three add `decode(f′) − decode(f)`, that is (f′_i − f_i)·‖W_dec[i]‖ along each direction, so that what the
dictionary does not reconstruct stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import DecodeStart, Edit, EditRequest, PositionRule, Site, edit_delta
from trimtab.steering.doses import DEFAULT_DOSE, DEFAULT_UNIT, check_doses, check_unit, coefficients
from trimtab.steering.table import DirectionTable

if TYPE_CHECKING:
    from trimtab.dictionaries.base import Dictionary

Operation = Literal["add", "ablate", "clamp", "scale"]
OPERATIONS: tuple[str, ...] = get_args(Operation)
Combine = Literal["each", "total"]


class Choice(NamedTuple):
    """Features and their doses, one row per edited token."""

    feature: Int[Tensor, "R K"]  # -1 for an empty slot
    dose: Float[Tensor, "R K"]


class Block(NamedTuple):
    """A range of a source's directions that share what a trace says about them."""

    start: int
    n: int
    unit: str
    operation: str
    dictionary_hash: str


class DirectionSource:
    """What all sources with one table of directions at one site share. Subclasses implement `pick`.

    Args:
        directions: a dictionary, or any table of directions.
        site: where to steer; the site that the dictionary names by default.
        unit: `relative`, `max_activation` or `absolute`; what it means is in `trimtab.steering.doses`. `ablate` and
            `scale` have no use for it.
        operation: `add`, `ablate`, `clamp` or `scale`.
        positions: `generated`, `prompt`, `all`, `START:STOP`, or a rule.
        combine: how several features at one token share a dose. `each` gives every feature its own dose, so that ‖Δ‖
            depends on the angles between them. `total` scales them by one factor so that ‖Δ‖ is the mean of their
            lengths, which keeps doses comparable between sources. Only for `add`.

    Raises:
        UserError: something is not one of the allowed values, the site is unknown, or statistics are missing.
    """

    def __init__(
        self,
        directions: Dictionary | DirectionTable,
        site: Site | str | None = None,
        *,
        unit: str = DEFAULT_UNIT,
        operation: str = "add",
        positions: PositionRule | str = "generated",
        combine: str = "each",
    ) -> None:
        self.table = directions if isinstance(directions, DirectionTable) else DirectionTable.of(directions)
        for name, value, allowed in (
            ("operation", operation, OPERATIONS),
            ("combine", combine, get_args(Combine)),
        ):
            if value not in allowed:
                raise UserError(f"{name} {value!r}", f"allowed are {', '.join(allowed)}", "choose one of them")
        if operation != "add" and self.table.dictionary is None:
            raise UserError(f"operation {operation}", "it needs a dictionary that encodes", "use operation add")
        if operation != "add" and combine != "each":
            raise UserError(f"combine {combine}", "only doses that are added can be shared", "use operation add")
        if operation in ("add", "clamp"):
            check_unit(unit, has_statistics=self.table.max_activation is not None)
        named = "" if self.table.dictionary is None else self.table.dictionary.info.site
        if not site and not named:
            raise UserError("the site", "the dictionary does not name the one it reads", "give a site")
        self.sites: tuple[Site, ...] = (Site.parse(site or named),)
        self.positions = PositionRule.parse(positions) if isinstance(positions, str) else positions
        self.unit = {"ablate": "absolute", "scale": "factor"}.get(operation, unit)
        self.operation, self.combine = operation, combine
        self.dictionary_hash = self.table.hash

    def directions(self, site: Site) -> Float[Tensor, "n d"]:
        """The table's unit rows."""
        return self.table.rows

    def blocks(self, site: Site) -> tuple[Block, ...]:
        """All rows are of one kind."""
        return (Block(0, self.table.n, self.unit, self.operation, self.dictionary_hash),)

    def start(self, start: DecodeStart) -> None:
        """Move the directions to where decoding happens."""
        self.begun = start
        self.table.to(start.device)

    def choose(self, request: EditRequest) -> Edit | None:
        """Edits for one forward pass, from what `pick` chooses."""
        if request.x.shape[-1] != self.table.width:
            raise UserError(
                f"directions of width {self.table.width}",
                f"site {request.site} has width {request.x.shape[-1]}",
                "choose a dictionary trained at this site of this model",
            )
        choice = self.pick(request)
        return None if choice is None else self.edit(request.x, choice)

    def pick(self, request: EditRequest) -> Choice | None:
        """Features and doses for the rows of one forward pass."""
        raise NotImplementedError

    def edit(self, x: Float[Tensor, "R d"], choice: Choice) -> Edit:
        """The edit that a choice means for activations `x`, under this source's operation, unit and sharing."""
        feature, dose = choice.feature, choice.dose
        if self.operation in ("add", "clamp"):
            coefficient = coefficients(self.unit, dose, x, self.table.most_active(feature))
            if self.operation == "clamp":
                coefficient = coefficient - self.table.strengths(x, feature)
            elif self.combine == "total":
                coefficient = share_dose(self.table.rows, feature, coefficient)
        elif self.operation == "scale":
            coefficient = (dose.to(x.device) - 1) * self.table.strengths(x, feature)
        else:
            dose = torch.zeros_like(dose)
            coefficient = -self.table.strengths(x, feature)
        return Edit(feature, torch.where(feature >= 0, coefficient, 0), torch.where(feature >= 0, dose, 0))


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
        directions: a dictionary, or any table of directions.
        features: one id, several for every row, or a tensor `[N, K]` with each row's own (−1 for an empty slot).
        doses: one number, one per feature, or a tensor `[N, K]` or `[N, 1]` with each row's own.
        site, unit, operation, positions, combine: as in `DirectionSource`.

    Raises:
        UserError: also if a feature does not exist or a dose is not finite.
    """

    def __init__(
        self,
        directions: Dictionary | DirectionTable,
        features: int | Sequence[int] | Int[Tensor, "N K"],
        doses: float | Sequence[float] | Float[Tensor, "N K"] = DEFAULT_DOSE,
        site: Site | str | None = None,
        *,
        unit: str = DEFAULT_UNIT,
        operation: str = "add",
        positions: PositionRule | str = "generated",
        combine: str = "each",
    ) -> None:
        super().__init__(directions, site, unit=unit, operation=operation, positions=positions, combine=combine)
        check_doses(doses)
        feature = torch.atleast_2d(torch.as_tensor(features, dtype=torch.long))
        dose = torch.atleast_2d(torch.as_tensor(doses, dtype=torch.get_default_dtype()))
        check_features(feature, self.table.n)
        try:
            self.feature, self.dose = torch.broadcast_tensors(feature, dose)
        except RuntimeError:
            raise UserError(
                f"{dose.shape[-1]} doses", f"there are {feature.shape[-1]} features", "give one dose, or one for each"
            ) from None
        if self.feature.shape[0] > 1 and feature.shape[0] not in (1, self.feature.shape[0]):
            raise UserError("doses per row", "rows do not match those of the features", "give as many of both")

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        if self.feature.shape[0] not in (1, len(start.prompts)):
            raise UserError(
                f"features for {self.feature.shape[0]} rows", f"{len(start.prompts)} rows are decoded", "give one each"
            )
        self.feature, self.dose = self.feature.to(start.device), self.dose.to(start.device)

    def pick(self, request: EditRequest) -> Choice:
        if self.feature.shape[0] == 1:
            rows = len(request.row)
            return Choice(self.feature.expand(rows, -1), self.dose.expand(rows, -1))
        return Choice(self.feature[request.row], self.dose[request.row])


class VectorSource(StaticSource):
    """A constant dose of any vector: a difference of means, a probe's direction, a supervised feature.

    Args:
        vectors: `[d]` or `[n, d]`; only the direction counts, the dose gives the length.
        site: where to steer.
        doses: one number, or one per vector.
        max_activation: `[n]` largest projection of real activations, if doses are in `max_activation`.
        unit, positions, combine: as in `DirectionSource`.
    """

    def __init__(
        self,
        vectors: Float[Tensor, "n d"] | Float[Tensor, " d"],
        site: Site | str,
        doses: float | Sequence[float] = DEFAULT_DOSE,
        *,
        max_activation: Float[Tensor, " n"] | None = None,
        unit: str = DEFAULT_UNIT,
        positions: PositionRule | str = "generated",
        combine: str = "each",
    ) -> None:
        table = DirectionTable(torch.atleast_2d(vectors), max_activation=max_activation)
        if bool((table.rows.norm(dim=-1) == 0).any()):
            raise UserError("a steering vector", "it is zero, so it has no direction", "give another")
        super().__init__(table, range(table.n), doses, site, unit=unit, positions=positions, combine=combine)


class ScheduleSource(DirectionSource):
    """Features and doses that a function chooses at every token.

    Args:
        directions: a dictionary, or any table of directions.
        schedule: from a request (activations, rows, positions, tokens) to a `Choice`, or None to edit nothing.
        site, unit, operation, positions, combine: as in `DirectionSource`.

    Raises:
        UserError: also, while decoding, if the function returns a feature that does not exist or a dose that is not
            finite.
    """

    def __init__(
        self,
        directions: Dictionary | DirectionTable,
        schedule: Callable[[EditRequest], Choice | None],
        site: Site | str | None = None,
        *,
        unit: str = DEFAULT_UNIT,
        operation: str = "add",
        positions: PositionRule | str = "generated",
        combine: str = "each",
    ) -> None:
        super().__init__(directions, site, unit=unit, operation=operation, positions=positions, combine=combine)
        self.schedule = schedule

    def pick(self, request: EditRequest) -> Choice | None:
        choice = self.schedule(request)
        if choice is not None:
            check_features(choice.feature, self.table.n)
            check_doses(choice.dose)
        return choice


def check_features(feature: Tensor, n: int) -> None:
    """Raise a `UserError` if an id is not one of `n` features (or −1)."""
    bad = feature[(feature < -1) | (feature >= n)]
    if len(bad):
        raise UserError(f"feature {int(bad[0])}", f"the dictionary has features 0 to {n - 1}", "choose one of them")
