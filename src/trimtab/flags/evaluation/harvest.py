"""One pass over labelled texts for all that reads activations: the residual stream where probes look, flags everywhere.

Each activation is kept at the last prompt token, which sees nothing of the response, and as the mean over the
response's tokens, which give the concept away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.flags.evaluation.texts import LabelledTexts
from trimtab.flags.examples import LabelledBatch, batch_of
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, Site, edited

PLACES = ("prompt", "response")
"""The last prompt token; the mean over the response's tokens."""


class Harvest(NamedTuple):
    """Activations of N examples at both places, on the CPU in float32."""

    residual: dict[int, Float[Tensor, "2 N d"]]
    """After each of some layers."""
    held: Float[Tensor, "2 N S K"]
    """What the flags' dimensions hold at their sites."""
    unassigned: Float[Tensor, "2 N S K"]
    """The same of as many dimensions that are no flag's."""


@torch.no_grad()
def harvest(
    model: LanguageModel,
    flags: FlagSpec,
    unassigned: FlagSpec,
    texts: LabelledTexts,
    layers: Sequence[int],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Harvest:
    """Read activations in one forward pass of each example.

    Args:
        model: the model.
        flags: its flags.
        unassigned: other dimensions at the same sites.
        texts: examples.
        layers: after which the whole residual stream is kept.
        batch_size: examples of a pass.
        progress: told of the examples done.
    """
    n, k = len(texts), len(flags.flat_dims)
    sites = flags.sites
    dims = torch.tensor([*flags.flat_dims, *unassigned.flat_dims], device=model.device)
    held = torch.zeros(2, n, len(sites), 2 * k)
    residual = {layer: torch.zeros(2, n, model.d_model) for layer in layers}
    index = {site: i for i, site in enumerate(sites)}

    def read(site: Site, rows: list[int], batch: LabelledBatch, x: Tensor) -> None:
        if site in index:
            held[:, rows, index[site]] = pooled(x.index_select(-1, dims), batch)
        if site.kind == "resid_post" and site.layer in residual:
            residual[site.layer][:, rows] = pooled(x, batch)

    wanted = dict.fromkeys([*sites, *(Site("resid_post", layer) for layer in layers)])
    for rows in texts.by_length(batch_size):
        part = texts.take(rows)
        batch = batch_of(model, flags, part.examples, part.tokens)
        with edited(model, {site: partial(read, site, rows, batch) for site in wanted}):
            model.forward(batch.tokens, last=1)
        if progress:
            progress(len(rows))
    return Harvest(residual, held[..., :k], held[..., k:])


def pooled(x: Float[Tensor, "B T w"], batch: LabelledBatch) -> Float[Tensor, "2 B w"]:
    """Values at the last prompt token, and their mean over the response's tokens."""
    x = x.float()
    share = batch.answer / batch.answer.sum(dim=1, keepdim=True)
    last = x[torch.arange(len(x), device=x.device), last_prompt_place(batch)]
    return torch.stack([last, torch.einsum("btw,bt->bw", x, share)]).cpu()


def last_prompt_place(batch: LabelledBatch) -> Int[Tensor, " B"]:
    """Where each row's last prompt token stands: before the first token of its response."""
    return batch.answer.int().argmax(dim=1) - 1
