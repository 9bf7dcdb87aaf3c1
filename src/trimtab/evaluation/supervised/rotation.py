"""A learned rotation: subspaces in which IO, S and Pos can be interchanged (Geiger et al. 2024, arXiv 2303.02536).

At each location of a cross-section some columns of an orthonormal basis are for IO, others for S and for Pos. An
attribute's coordinates are taken from the counterfactual prompt, x + R_a R_aᵀ (x' − x), at all locations at once, and
the model shall say what it says with the whole counterfactual activations. The basis begins with the directions in
which counterfactuals differ most, and is trained through the model. A name may need a direction of its own, an order
needs one: columns go to the attributes by strength, not in equal shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.control import EditedRows
from trimtab.evaluation.supervised.cross_sections import PatchedPrompts, Values
from trimtab.tasks.ioi_prompts import ATTRIBUTES

RANK = 16
"""Directions of an attribute, on average: with 16 three quarters of a head of width 64 are shared out."""
STEPS = 24
"""Of training, each on one batch and one attribute."""
LR = 0.02


class Rotation(NamedTuple):
    """Per location a mean, an orthonormal basis, and the attribute that each of its columns is for."""

    means: Mapping[Location, Tensor]  # [w]
    bases: Mapping[Location, Tensor]  # [w, columns]
    owners: Mapping[Location, tuple[str, ...]]  # [columns]

    def block(self, place: Location, attribute: str) -> Float[Tensor, "w r"]:
        """The directions of an attribute.

        Raises:
            UserError: there is no such attribute.
        """
        if attribute not in ATTRIBUTES:
            why = f"the rotation has subspaces of {', '.join(ATTRIBUTES)}"
            raise UserError(f"attribute {attribute!r}", why, "choose one of them")
        return self.bases[place][:, [owner == attribute for owner in self.owners[place]]]

    def edit(
        self, place: Location, x: Float[Tensor, "P w"], counterfactual: Float[Tensor, "P w"], attribute: str
    ) -> EditedRows:
        """Take an attribute's coordinates from the counterfactual activations.

        What is removed is weighed among the three subspaces about the mean, of which the weights sum to 1.
        """
        about = x - self.means[place]
        whole = (about @ self.bases[place]).square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
        removed = (about @ self.block(place, attribute)).square().sum(1) / whole
        return EditedRows(interchanged(x, counterfactual, self.block(place, attribute)), removed)

    def reconstruct(self, place: Location, x: Float[Tensor, "P w"]) -> Float[Tensor, "P w"]:
        """The mean, and what of the rest is in the three subspaces."""
        mean, basis = self.means[place], self.bases[place]
        return mean + (x - mean) @ basis @ basis.T


def interchanged(
    x: Float[Tensor, "P w"], counterfactual: Float[Tensor, "P w"], block: Float[Tensor, "w r"]
) -> Float[Tensor, "P w"]:
    """x + R Rᵀ (x' − x)."""
    return x + (counterfactual - x) @ block @ block.T


def random_rotation(rotation: Rotation, *, seed: int = 0) -> Rotation:
    """Random subspaces of the same sizes, as the control."""
    generator = torch.Generator().manual_seed(seed)
    bases = {
        place: torch.linalg.qr(torch.randn(basis.shape, generator=generator)).Q.to(basis)
        for place, basis in rotation.bases.items()
    }
    return rotation._replace(bases=bases)


def difference_rotation(
    means: Mapping[Location, Float[Tensor, " w"]],
    activations: Values,
    changed: Mapping[str, Values],
    rank: int = RANK,
) -> Rotation:
    """The directions in which counterfactuals in one attribute differ most from their prompts, in closed form.

    Again and again the largest of all leading directions, among what is orthogonal to those taken so far, goes to the
    attribute whose differences it leads; every attribute gets one at least.

    Args:
        means: of each location.
        activations: of P prompts.
        changed: per attribute those of the prompts' counterfactuals in it.
        rank: directions of an attribute, on average.

    Raises:
        UserError: three subspaces do not fit the width, or an attribute has no counterfactuals.
    """
    missing = next((attribute for attribute in ATTRIBUTES if attribute not in changed), None)
    if missing is not None:
        raise UserError(f"attribute {missing}", "there are no counterfactuals in it", "give some for IO, S and Pos")
    bases: dict[Location, Tensor] = {}
    owners: dict[Location, tuple[str, ...]] = {}
    for place, mean in means.items():
        _check_rank(rank, len(mean), place)
        squares = {}
        for attribute in ATTRIBUTES:
            delta = (changed[attribute][place] - activations[place]).double()
            squares[attribute] = delta.T @ delta
        taken, owned = _shared_out(squares, len(ATTRIBUTES) * rank)
        bases[place], owners[place] = torch.linalg.qr(taken).Q.to(mean), owned
    return Rotation(means, bases, owners)


def _shared_out(squares: Mapping[str, Float[Tensor, "w w"]], n: int) -> tuple[Float[Tensor, "w n"], tuple[str, ...]]:
    """Directions by the strength of differences, whose sums of squares are given, and the attribute of each."""
    free = torch.eye(len(next(iter(squares.values()))), dtype=torch.float64)  # projects onto what nobody has taken
    leading: dict[str, tuple[float, Tensor]] = {}  # per attribute; what is known only sinks as others take directions
    taken: list[Tensor] = []
    owners: list[str] = []
    while len(taken) < n:
        without = [attribute for attribute in squares if attribute not in owners]
        able = without if len(without) == n - len(taken) else list(squares)
        known: set[str] = set()
        while (most := max(able, key=lambda a: leading[a][0] if a in leading else torch.inf)) not in known:
            values, vectors = torch.linalg.eigh(free @ squares[most] @ free)
            leading[most] = float(values[-1]), vectors[:, -1]
            known.add(most)
        size, direction = leading[most]
        if size <= 1e-12 * float(squares[most].trace()):
            # What no difference reaches is as good as any other direction that is free.
            direction = torch.linalg.eigh(free).eigenvectors[:, -1]
        taken.append(direction)
        owners.append(most)
        free = free - torch.outer(direction, direction)
    return torch.stack(taken, 1), tuple(owners)


class LearnedRotation(NamedTuple):
    """A rotation, and how training went."""

    rotation: Rotation
    start: Rotation  # what it began with
    losses: tuple[float, ...]  # of each step, cross entropy in nats


@torch.enable_grad()
def learn_rotation(
    prompts: PatchedPrompts,
    changed: Mapping[str, Values],
    means: Mapping[Location, Float[Tensor, " w"]],
    *,
    rank: int = RANK,
    steps: int = STEPS,
    lr: float = LR,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LearnedRotation:
    """Train subspaces so that an interchange does what the whole counterfactual activations do.

    Each step takes a batch of prompts and an attribute in turn. The loss is the cross entropy of the model's next-token
    distribution under the interchange against that under true counterfactual patching.

    Args:
        prompts: train prompts at all locations of a cross-section.
        changed: per attribute the activations of their counterfactuals in it, as `activations_of` gives them.
        means: of each location, over the prompts that dictionaries were fitted on.
        rank: directions of an attribute, on average.
        steps: of Adam; 0 for the closed form alone.
        lr: of Adam.
        seed: of the order of batches.
        progress: called with 1 for each step that is done.

    Raises:
        UserError: three subspaces do not fit the width, an attribute has no counterfactuals, or a number of steps or a
            learning rate that cannot be.
    """
    if steps < 0 or lr <= 0:
        raise UserError(f"{steps} steps with lr {lr:g}", "steps must be at least 0 and lr above 0", "change it")
    start = difference_rotation(means, prompts.activations, changed, rank)
    places = prompts.locations
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the directions that complete each basis
        bases = _Bases(torch.stack([start.bases[place] for place in places]))
    optimiser = torch.optim.Adam(bases.parameters(), lr=lr)
    turns = _turns(len(prompts.batches), steps, seed)
    targets: dict[tuple[str, int], Tensor] = {}
    losses: list[float] = []
    for attribute, batch in turns:
        true = changed[attribute]
        if (attribute, batch) not in targets:
            with torch.no_grad():
                targets[attribute, batch] = prompts.logits(batch, true).softmax(-1)
        now = start._replace(bases=dict(zip(places, bases.weight, strict=True)))
        values = {
            place: interchanged(x, true[place], now.block(place, attribute)) for place, x in prompts.activations.items()
        }
        loss = F.cross_entropy(prompts.logits(batch, values), targets[attribute, batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(1)
    learned = start._replace(bases=dict(zip(places, bases.weight.detach(), strict=True))) if steps else start
    return LearnedRotation(learned, start, tuple(losses))


class _Bases(nn.Module):
    """Orthonormal columns at each of L locations of one width."""

    def __init__(self, start: Float[Tensor, "L w columns"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())
        orthogonal(self, "weight", orthogonal_map="matrix_exp")


def _turns(n_batches: int, steps: int, seed: int) -> list[tuple[str, int]]:
    """Attributes in turn, each going through all batches in an order of its own before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps // (len(ATTRIBUTES) * n_batches)) if steps else 0
    found: list[tuple[str, int]] = []
    for _ in range(rounds):
        orders = [torch.randperm(n_batches, generator=generator).tolist() for _ in ATTRIBUTES]
        found += [(a, order[i]) for i in range(n_batches) for a, order in zip(ATTRIBUTES, orders, strict=True)]
    return found[:steps]


def _check_rank(rank: int, width: int, place: Location) -> None:
    if rank < 1 or len(ATTRIBUTES) * rank > width:
        raise UserError(
            f"rank {rank}",
            f"{len(ATTRIBUTES)} times as many directions must fit into width {width} at {place}",
            f"choose 1 to {width // len(ATTRIBUTES)}",
        )
