"""What a choice of features and doses does to an activation: one small function per operation.

An operation gets `Slots` and gives coefficients along the features' unit directions. `@operation` puts it into
`OPERATIONS`, under its name; sources, traces, replays and the command line take all that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError, check_one_of
from trimtab.runs.named import module_of
from trimtab.steering.direction_table import DirectionTable
from trimtab.steering.doses import coefficients

DEPENDENT = 1e-5
"""Unit directions are linearly dependent if their Gram matrix has a smaller eigenvalue."""


@dataclass(frozen=True)
class Slots:
    """What an operation is shown: R activations, and up to K features and doses for each."""

    x: Float[Tensor, "R d"]
    feature: Int[Tensor, "R K"]
    """Rows of the table; −1 for an empty slot, where the operation may give anything."""
    dose: Float[Tensor, "R K"]
    unit: str
    table: DirectionTable

    @property
    def length(self) -> Float[Tensor, "R K"]:
        """The doses as lengths along the unit directions, in model units."""
        length = coefficients(self.unit, self.dose, self.x, self.table.most_active(self.feature))
        return length if self.table.length is None else length * self.table.length[self.feature.clamp_min(0)]

    @property
    def strength(self) -> Float[Tensor, "R K"]:
        """How far x lies along each direction in the dictionary's eyes, f_i·‖W_dec[i]‖; without one, x·v̂."""
        return self.table.strengths(self.x, self.feature)

    @property
    def projection(self) -> Float[Tensor, "R K"]:
        """x·v̂ along each direction."""
        return self.table.projections(self.x, self.feature)

    def moving(self, strength: Float[Tensor, "R K"]) -> Float[Tensor, "R K"]:
        """Coefficients that change every strength by so much.

        A dictionary's features keep to themselves, as `decode(f′) − decode(f)` does. Without a dictionary, projections
        change, which directions at angles share.
        """
        return strength if self.table.dictionary is not None else self.projecting(strength)

    def projecting(self, change: Float[Tensor, "R K"]) -> Float[Tensor, "R K"]:
        """Coefficients that change every x·v̂ by so much, all of them together: the Gram matrix is solved for them.

        Raises:
            UserError: the directions of an activation's features are linearly dependent.
        """
        if change.shape[1] == 1:
            return change
        sets, which = self.feature.unique(dim=0, return_inverse=True)
        filled = (sets >= 0)[..., None]
        rows = torch.where(filled, self.table.rows[sets.clamp_min(0)].double(), 0)
        gram = rows @ rows.mT + torch.diag_embed((~filled[..., 0]).double())
        bad = (torch.linalg.eigvalsh(gram)[:, 0] < DEPENDENT).nonzero()[:, 0]
        if len(bad):
            ids = [int(feature) for feature in sets[bad[0]] if feature >= 0]
            raise UserError(
                f"features {', '.join(map(str, ids))}",
                "their directions are linearly dependent",
                "leave out one of them",
            )
        wanted = torch.where(self.feature >= 0, change, 0).double()
        return torch.linalg.solve(gram[which], wanted[..., None])[..., 0].to(change.dtype)


Coefficients = Callable[[Slots], Float[Tensor, "R K"]]


@dataclass(frozen=True)
class Operation:
    """A way of editing along directions."""

    name: str
    coefficients: Coefficients
    unit: str | None
    """What its doses are in; None if that is for the source to choose."""
    has_dose: bool
    sets: bool
    """Whether the coordinate along each direction becomes the dose; along axes it then does so bit for bit."""


OPERATIONS: dict[str, Operation] = {}


def operation(
    *, unit: str | None = None, has_dose: bool = True, sets: bool = False
) -> Callable[[Coefficients], Coefficients]:
    """Register a function as the operation of its name; the fields are `Operation`'s. It may be defined again.

    Raises:
        UserError: another operation has the name.
    """

    def register(fn: Coefficients) -> Coefficients:
        known = OPERATIONS[fn.__name__].coefficients if fn.__name__ in OPERATIONS else fn
        if any(getattr(known, name) != getattr(fn, name) for name in ("__module__", "__qualname__")):
            raise UserError(f"operation {fn.__name__!r}", "there is already one of this name", "choose another name")
        OPERATIONS[fn.__name__] = Operation(fn.__name__, fn, unit, has_dose, sets)
        return fn

    return register


def operation_named(name: str) -> Operation:
    """The operation of that name, or of `module:name`, whose module registers it.

    Raises:
        UserError: there is none.
    """
    if ":" in str(name):
        module_of(name, "operation")
        name = name.partition(":")[2]
    check_one_of("operation", name, OPERATIONS)
    return OPERATIONS[name]


@operation()
def add(at: Slots) -> Tensor:
    """Add the dose along each feature's unit direction."""
    return at.length


@operation(unit="absolute", has_dose=False)
def ablate(at: Slots) -> Tensor:
    """Set the feature's code to 0; without a dictionary, project its direction out."""
    return at.moving(-at.strength)


@operation()
def clamp(at: Slots) -> Tensor:
    """Set the feature's code, so that it contributes the dose; without a dictionary, x·v̂ becomes the dose."""
    return at.moving(at.length - at.strength)


@operation(unit="factor")
def scale(at: Slots) -> Tensor:
    """Multiply the feature's code by the dose; without a dictionary, x·v̂."""
    return at.moving((at.dose.to(at.x.device) - 1) * at.strength)


@operation(sets=True)
def overwrite(at: Slots) -> Tensor:
    """Set the coordinate along the feature's direction: x·v̂ becomes the dose, for all features at once."""
    return at.projecting(at.length - at.projection)
