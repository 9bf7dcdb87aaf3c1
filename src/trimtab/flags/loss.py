"""The loss of flags, and what a forward pass says of them, read at their sites while it goes on.

The loss is a mean over the responses' tokens, sites and dimensions of how far h, what a dimension holds, is from y·t: t
is the site's target, y 1 where the response needs the concept and 0 where it does not. Prompts have no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from trimtab.errors import named
from trimtab.flags.examples import LabelledBatch
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, Site, edited
from trimtab.lm.taps import CoordinateReader, Coordinates

LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normalised_l1": lambda error, target: error.abs() / target,
    "l1": lambda error, _target: error.abs(),
    "squared": lambda error, _target: error.square(),
    "normalised_squared": lambda error, target: (error / target).square(),
}
"""From h − y·t and t: |h − y·t|/t, |h − y·t|, (h − y·t)², ((h − y·t)/t)².

The paper's code has the first, its text the next two. Where a concept is rare, absolute errors pull its flag to the
median, which is off until the concept is likelier than not; squared ones pull it to the probability itself.
"""


class FlagReading:
    """What the flags hold in a forward pass of one batch.

    Inside the pass no more happens at a site than that its K coordinates are copied; all else is computed at once.
    Where layers are computed again for their gradients, what was read first stands.

    Args:
        spec: the flags.
        batch: what goes through the model.
        form: name of a loss.
        gradients: let the loss reach the model.

    Raises:
        UserError: there is no loss of that name.
    """

    def __init__(self, spec: FlagSpec, batch: LabelledBatch, form: str = "normalised_l1", *, gradients: bool = True):
        self._spec, self._batch, self._gradients = spec, batch, gradients
        self._form = named(LOSSES, form, "loss")
        device = batch.labels.device
        self._dims = torch.tensor(spec.flat_dims, device=device)
        self._concept = torch.tensor(spec.concept_of, device=device)
        self._target = torch.tensor(list(spec.targets.values()), device=device)[:, None, None, None]
        self._seen: dict[Site, Tensor] = {}

    def reading(self, model: LanguageModel) -> AbstractContextManager[None]:
        """Read in the forward pass inside the block."""
        return edited(
            model, {site: CoordinateReader(self._dims, partial(self._keep, site)) for site in self._spec.sites}
        )

    def _keep(self, site: Site, held: Tensor) -> None:
        self._seen.setdefault(site, held if self._gradients else held.detach())

    @cached_property
    def _held(self) -> Float[Tensor, "S B T K"]:
        return torch.stack([self._seen[site].to(self._dims.device) for site in self._spec.sites]).float()

    @cached_property
    def _by_row(self) -> Float[Tensor, " B"]:
        """Sums over tokens of the mean over sites and dimensions."""
        labels = self._batch.labels[:, None, self._concept]  # [B, 1, K]
        loss = self._form(self._held - self._target * labels, self._target).mean(dim=(0, 3))
        return (loss * self._batch.answer).sum(dim=1)

    @property
    def loss_sum(self) -> Float[Tensor, ""]:
        """Sum over the responses' tokens of the mean over sites and dimensions."""
        return self._by_row.sum()

    @property
    def loss_by_row(self) -> Float[Tensor, " B"]:
        """Mean over the tokens, sites and dimensions of each example."""
        return self._by_row / self._batch.answer.sum(dim=1)

    @property
    def strength(self) -> Float[Tensor, "B C"]:
        """Mean of h/t over the response's tokens, sites and the concept's dimensions: 0 off, 1 on."""
        answer = self._batch.answer
        share = answer / answer.sum(dim=1, keepdim=True)
        held = torch.einsum("sbtk,bt->bsk", self._held.detach(), share)
        return read_strengths(self._spec, held).mean(dim=1)


def read_strengths(spec: FlagSpec, held: Float[Tensor, "... S K"]) -> Float[Tensor, "... S C"]:
    """Mean of h/t over each concept's dimensions: 0 off, 1 on.

    Args:
        spec: says which dimensions are whose, and the targets t.
        held: what the dimensions hold, h, at each site.
    """
    target = torch.tensor(list(spec.targets.values()), device=held.device)[:, None]
    owner = one_hot(torch.tensor(spec.concept_of, device=held.device), len(spec.concepts)).to(held)
    return (held / target) @ (owner / owner.sum(dim=0))


def forcing(
    model: LanguageModel, spec: FlagSpec, labels: Float[Tensor, "B C"] | Float[Tensor, "1 C"]
) -> AbstractContextManager[None]:
    """Write the flags of every row, at every site and position, in every forward pass inside the block.

    Args:
        model: the model.
        spec: the flags.
        labels: 1 for on, 0 for off; what lies between for what lies between.
    """
    dims = torch.tensor(spec.flat_dims, device=labels.device)
    each = labels[:, spec.concept_of]
    return edited(model, {site: Coordinates(dims, spec.targets[str(site)] * each) for site in spec.sites})


def response_loss(model: LanguageModel, batch: LabelledBatch) -> Float[Tensor, " N"]:
    """Cross-entropy of each of the responses' tokens, row by row, in nats."""
    n = batch.answer_length
    logits = model.forward(batch.tokens, last=n + 1)[:, :-1]
    kept = batch.answer[:, -n:]
    return cross_entropy(logits[kept].float(), batch.tokens.ids[:, -n:][kept], reduction="none")


def response_sums(model: LanguageModel, batch: LabelledBatch) -> Float[Tensor, " B"]:
    """Cross-entropy of each response, in nats summed over its tokens, in float64."""
    each = response_loss(model, batch).double().split(batch.answer.sum(dim=1).tolist())
    return torch.stack([row.sum() for row in each])
