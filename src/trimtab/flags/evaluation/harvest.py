"""One forward pass of each labelled text for all that is measured of activations and responses.

The residual stream where probes look, and what flags hold everywhere, are kept at the last prompt token, which sees
nothing of the response, and as the mean over the response's tokens, which give the concept away. Where models are run
again with something changed, what layers were given and what flags held at each token is kept as well.
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
from trimtab.flags.loss import response_sums
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, Site, edited
from trimtab.lm.taps import CoordinateReader, Tap
from trimtab.lm.upper_layers import input_site

PLACES = ("prompt", "response")
"""The last prompt token; the mean over the response's tokens."""


class Harvest(NamedTuple):
    """Forward passes of N examples with nothing changed, on the CPU in float32."""

    residual: dict[int, Float[Tensor, "2 N d"]]
    """After each of some layers, at both places."""
    dims: list[int]
    """M dimensions: the flags', and those that controls are drawn from."""
    pooled: Float[Tensor, "2 N S M"]
    """What these hold at the flags' sites, at both places."""
    nats: Float[Tensor, " N"]
    """Cross-entropy of each response, summed over its tokens, in float64. This and what follows is there only if
    layers are named whose inputs are to be kept."""
    n_tokens: Float[Tensor, " N"]
    """Of each response."""
    inputs: dict[int, list[Float[Tensor, "T d"]]]
    """What some layers were given, example by example."""
    held: list[Float[Tensor, "T S M"]]
    """What the M dimensions held at the flags' sites."""

    def of(self, spec: FlagSpec) -> Float[Tensor, "2 N S K"]:
        """What the dimensions of flags, or of a control drawn for them, hold at the flags' sites, at both places."""
        return self.pooled[..., [self.dims.index(dim) for dim in spec.flat_dims]]


@torch.no_grad()
def harvest(
    model: LanguageModel,
    flags: FlagSpec,
    others: Sequence[int],
    texts: LabelledTexts,
    layers: Sequence[int],
    *,
    inputs: Sequence[int] = (),
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Harvest:
    """Read activations in one forward pass of each example.

    Args:
        model: the model.
        flags: its flags.
        others: dimensions that controls are drawn from.
        texts: examples.
        layers: after which the residual stream is kept.
        inputs: layers whose inputs are kept token by token.
        batch_size: examples of a pass.
        progress: told of the examples done.
    """
    n, sites, dims = len(texts), flags.sites, [*flags.flat_dims, *others]
    chosen, nothing = torch.tensor(dims, device=model.device), [torch.zeros(0)] * n
    found = Harvest(
        residual={layer: torch.zeros(2, n, model.d_model) for layer in layers}, dims=dims,
        pooled=torch.zeros(2, n, len(sites), len(dims)),
        nats=torch.zeros(n, dtype=torch.float64), n_tokens=torch.zeros(n, dtype=torch.float64),
        inputs={layer: [*nothing] for layer in inputs}, held=nothing,
    )  # fmt: skip
    whole = {Site("resid_post", layer) for layer in layers} | {input_site(layer) for layer in inputs}
    for rows in texts.by_length(batch_size):
        part = texts.take(rows)
        batch = batch_of(model, flags, part.examples, part.tokens)
        held: dict[Site, Tensor] = {}
        stream: dict[Site, Tensor] = {}
        taps: dict[Site, Tap] = {site: CoordinateReader(chosen, partial(held.__setitem__, site)) for site in sites}
        taps |= {site: partial(stream.__setitem__, site) for site in whole}
        with edited(model, taps):
            if inputs:
                found.nats[rows] = response_sums(model, batch).cpu()
            else:
                model.forward(batch.tokens, last=1)
        at = [held[site] if site in held else stream[site].index_select(-1, chosen) for site in sites]
        at_sites = torch.stack(at, dim=2)  # [B, T, S, M]
        found.pooled[:, rows] = pooled(at_sites, batch)
        for layer in layers:
            found.residual[layer][:, rows] = pooled(stream[Site("resid_post", layer)], batch)
        for b, i in enumerate(rows if inputs else ()):
            real = batch.tokens.real[b]
            found.n_tokens[i], found.held[i] = batch.answer[b].sum(), at_sites[b, real].float().cpu()
            for layer in inputs:
                found.inputs[layer][i] = stream[input_site(layer)][b, real].float().cpu()
        if progress:
            progress(len(rows))
    return found


def pooled(x: Float[Tensor, "B T *w"], batch: LabelledBatch) -> Float[Tensor, "2 B *w"]:
    """Values at the last prompt token, and their mean over the response's tokens."""
    share = batch.answer / batch.answer.sum(dim=1, keepdim=True)
    last = x[torch.arange(len(x), device=x.device), last_prompt_place(batch)].float()
    return torch.stack([last, torch.einsum("bt...,bt->b...", x.float(), share)]).cpu()


def last_prompt_place(batch: LabelledBatch) -> Int[Tensor, " B"]:
    """Where each row's last prompt token stands: before the first token of its response."""
    return batch.answer.int().argmax(dim=1) - 1
