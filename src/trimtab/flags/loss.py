"""The loss of flags, and what a forward pass says of them, read at their sites while it goes on.

The loss is a mean over the responses' tokens, sites and dimensions of how far h, what a dimension holds, is from y·t: t
is the site's target, y 1 where the response needs the concept and 0 where it does not. Prompts have no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from trimtab.errors import named
from trimtab.flags.examples import LabelledBatch
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, edited
from trimtab.lm.taps import Coordinates

LOSSES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "normalised_l1": lambda error, target: error.abs() / target,
    "l1": lambda error, target: error.abs(),
    "squared": lambda error, target: error.square(),
}
"""From h − y·t and t: |h − y·t|/t, |h − y·t|, (h − y·t)². The paper's code has the first, its text the others."""


class FlagReading:
    """What the flags hold in the forward passes of one batch.

    Args:
        spec: the flags.
        batch: what goes through the model.
        form: name of a loss.
        gradients: let the loss reach the model.

    Attributes:
        strength: `[B, C]` mean of h/t over the response's tokens, sites and the concept's dimensions: 0 off, 1 on.
    """

    def __init__(self, spec: FlagSpec, batch: LabelledBatch, form: str = "normalised_l1", *, gradients: bool = True):
        self._spec, self._batch, self._gradients = spec, batch, gradients
        self._form = named(LOSSES, form, "loss")
        device = batch.labels.device
        self._dims = torch.tensor(spec.flat_dims, device=device)
        self._concept = torch.tensor(spec.concept_of, device=device)
        self._labels = batch.labels[:, None, self._concept]  # [B, 1, K]
        self._answer = batch.answer[..., None].float()  # [B, T, 1]
        self._tokens = self._answer.sum(dim=1)  # [B, 1]
        self._sum = torch.zeros(len(batch.labels), device=device)
        self._held = torch.zeros(len(batch.labels), len(spec.flat_dims), device=device)

    def reading(self, model: LanguageModel) -> AbstractContextManager[None]:
        """Read in every forward pass inside the block."""
        sites = self._spec.sites
        return edited(model, {site: partial(self._read, self._spec.targets[str(site)]) for site in sites})

    def _read(self, target: float, x: Tensor) -> None:
        held = (x if self._gradients else x.detach()).index_select(-1, self._dims).float()
        loss = self._form(held - target * self._labels, target)
        self._sum = self._sum + (loss * self._answer).sum(dim=(1, 2))
        self._held += (held.detach() * self._answer).sum(dim=1) / target

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Mean over tokens, sites and dimensions."""
        return self._sum.sum() / (self._tokens.sum() * len(self._spec.sites) * len(self._dims))

    @property
    def loss_by_row(self) -> Float[Tensor, " B"]:
        """The same for each example."""
        return self._sum / (self._tokens[:, 0] * len(self._spec.sites) * len(self._dims))

    @property
    def strength(self) -> Float[Tensor, "B C"]:
        held = self._held / (self._tokens * len(self._spec.sites))
        n = self._concept.bincount(minlength=len(self._spec.concepts))
        return torch.zeros_like(self._batch.labels).index_add(1, self._concept, held) / n


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
    changes = {site: Coordinates(dims, spec.targets[str(site)] * each) for site in spec.sites}
    return edited(model, {site: lambda _x, change=change: change for site, change in changes.items()})


def response_loss(model: LanguageModel, batch: LabelledBatch) -> Float[Tensor, " N"]:
    """Cross-entropy of each of the responses' tokens, row by row, in nats."""
    n = batch.answer_length
    logits = model.forward(batch.tokens, last=n + 1)[:, :-1]
    kept = batch.answer[:, -n:]
    return cross_entropy(logits[kept].float(), batch.tokens.ids[:, -n:][kept], reduction="none")
