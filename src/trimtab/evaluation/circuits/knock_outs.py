"""Prompts in which heads are put to their means: all but some, or some alone.

The mean of a head's output is taken over 32 sentences of the same template that name three persons, so that it keeps
what the words are and loses who is named twice (Wang et al. 2022, section 4).

Where all heads but some are at their means, a token that has none of these is what it is with every head at its mean.
So only the tokens that have some run, beside the keys and values that the others have then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.evaluation.circuits.patched_runs import Location, PatchedRuns
from trimtab.evaluation.circuits.rows import PlainRun, PromptRows, logit_difference, rows_of
from trimtab.lm import LanguageModel, RowDelta, Site, TokenBatch, capture, edited
from trimtab.lm.cache import GrowingCache
from trimtab.lm.precision import FLOAT32, product_precision
from trimtab.lm.unembedding import Unembedding
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt

Positions = Mapping[tuple[int, int], frozenset[str]]
"""Per (layer, head) the positions where something is done to it."""
N_SENTENCES = 32
"""For the means of a template, however many prompts it has."""


class _Batch(NamedTuple):
    rows: PromptRows
    clean: PlainRun
    means: list[Tensor]  # per layer [B, T, heads, head_dim]
    ablated: GrowingCache  # keys and values with every head at its mean
    cache: GrowingCache  # those of the plain run


class KnockOuts:
    """Logit differences of prompts, right name minus wrong one, with heads at their means.

    Args:
        model: with attention sites.
        ioi: where the prompts are from.
        prompts: P of them.
        seed: of the sentences for means.

    Attributes:
        full: of the plain model, `[P]`, in the order of the prompts' lengths, as all others.
        none: with every head at its mean, `[P]`.
        right: 1 where the plain model's likeliest token is the right name, else 0, `[P]`.

    Raises:
        UserError: a template has fewer sentences that name three persons than means take.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, ioi: IOIDistribution, prompts: Sequence[IOIPrompt], seed: int = 0) -> None:
        self.model, self._unembedding = model, Unembedding(model)
        means = {template: _means(model, ioi, template, seed) for template in {prompt.template for prompt in prompts}}
        self._batches: list[_Batch] = []
        nothing: list[Tensor] = []
        for rows in rows_of([ioi.tokenise(prompt) for prompt in prompts], model):
            templates = [prompts[number].template for number in rows.numbers]
            own = [torch.stack([means[name][layer] for name in templates]) for layer in range(model.n_layers)]
            ablated, cache = model.new_cache(), model.new_cache()
            with edited(model, _put(own, _kept(rows, own, {}))):
                last = capture(model, TokenBatch.full(rows.ids), [self._last], cache=ablated)[self._last]
            nothing.append(rows.at(last, "END"))
            self._batches.append(_Batch(rows, PlainRun.of(model, rows.ids, cache), own, ablated, cache))
        plain = [batch.rows.at(batch.clean.inputs[-1], "END") for batch in self._batches]
        self.full, self.right = self._differences(plain), self._named_right(plain)
        self.none = self._differences(nothing)
        self._few_tokens: bool | None = None

    @property
    def _last(self) -> Site:
        return Site("resid_post", self.model.n_layers - 1)

    @torch.no_grad()
    def only(self, kept: Positions) -> Float[Tensor, " P"]:
        """With every head at its mean wherever it is not kept."""
        if not kept:
            return self.none
        if self._few_tokens is False:
            return self._whole(kept)
        try:
            found = self._few(kept)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a foreign model says to tokens that stand apart
            if self._few_tokens:
                raise
            self._few_tokens = False
            return self._whole(kept)
        if self._few_tokens is None:  # tried once
            whole = self._whole(kept)
            precision = product_precision(self.model.dtype, self.model.device)
            error = 1e-3 if precision == FLOAT32 else 0.1
            self._few_tokens = torch.allclose(found, whole, atol=error * float(self.full.abs().max()), rtol=error)
            return whole
        return found

    @torch.no_grad()
    def without(self, ablated: Positions) -> Float[Tensor, " P"]:
        """With these heads at their means, and all others as they come out."""
        places = [
            Location(Site("attn_z", layer, head), name) for (layer, head), names in ablated.items() for name in names
        ]
        if not places:
            return self.full
        hidden: list[Tensor] = []
        for rows, clean, means, _, cache in self._batches:
            values = {p: rows.at(means[p.site.layer][:, :, p.site.head], p.position) for p in places}
            hidden.append(PatchedRuns(self.model, rows, clean, places, 1, cache).run(values))
        return self._differences(hidden)

    def _whole(self, kept: Positions) -> Float[Tensor, " P"]:
        """All tokens run."""
        hidden: list[Tensor] = []
        for rows, _, means, *_ in self._batches:
            with edited(self.model, _put(means, _kept(rows, means, kept))):
                found = capture(self.model, TokenBatch.full(rows.ids), [self._last])[self._last]
            hidden.append(rows.at(found, "END"))
        return self._differences(hidden)

    def _few(self, kept: Positions) -> Float[Tensor, " P"]:
        """Tokens that have kept heads run, and the last one."""
        names = sorted({name for found in kept.values() for name in found} | {"END"})
        return self._differences([self._few_of(batch, kept, names) for batch in self._batches])

    def _few_of(self, batch: _Batch, kept: Positions, names: Sequence[str]) -> Float[Tensor, "B d"]:
        rows, _, means, ablated, _ = batch
        time = torch.stack([rows.positions[name] for name in names], 1)  # [B, Q]
        each = torch.arange(len(time), device=time.device)[:, None]
        own, keep = [mean[each, time] for mean in means], _kept(rows, means, kept)[:, each, time]
        seen = torch.arange(rows.ids.shape[1], device=time.device) <= time[..., None]
        unseen = torch.finfo(self.model.dtype).min
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=time.device).masked_fill(~seen, unseen)[:, None]
        found: list[Tensor] = []

        def read(x: Tensor) -> None:
            found.append(x[:, names.index("END")])
            raise _LastLayerRead

        with suppress(_LastLayerRead), edited(self.model, {**_put(own, keep), self._last: read}):
            given = {"input_ids": rows.ids[each, time], "position_ids": time, "attention_mask": mask, "use_cache": True}
            self.model.call(**given, **{self.model.cache_argument: ablated.in_places(time)}, logits_to_keep=1)
        return found[0]

    def _differences(self, hidden: Sequence[Float[Tensor, "B d"]]) -> Float[Tensor, " P"]:
        pairs = zip(self._batches, hidden, strict=True)
        found = [logit_difference(self._unembedding, x, batch.rows.answers) for batch, x in pairs]
        return torch.cat(found).cpu().double()

    def _named_right(self, hidden: Sequence[Float[Tensor, "B d"]]) -> Float[Tensor, " P"]:
        pairs = zip(self._batches, hidden, strict=True)
        found = [self._unembedding.logits(x).argmax(-1) == batch.rows.answers[:, 0] for batch, x in pairs]
        return torch.cat(found).cpu().double()


class _LastLayerRead(Exception):  # noqa: N818
    """Ends a forward pass; it is no error."""


def _means(
    model: LanguageModel, ioi: IOIDistribution, template: str, seed: int
) -> list[Float[Tensor, "T heads head_dim"]]:
    """For each layer, mean outputs of all heads, token by token."""
    sites = [Site("attn_z", layer) for layer in range(model.n_layers)]
    tokens = [ioi.tokenise(prompt) for prompt in ioi.three_persons(template, N_SENTENCES, seed=seed)]
    (rows,) = rows_of(tokens, model)  # of one length, as prompts of a template are
    found = capture(model, TokenBatch.full(rows.ids), sites)
    return [found[site].float().mean(0) for site in sites]


def _put(
    means: Sequence[Float[Tensor, "B Q heads head_dim"]], keep: Bool[Tensor, "layers B Q heads"]
) -> dict[Site, Callable[[Tensor], RowDelta]]:
    """Edits that put heads to their means wherever they are not kept."""
    batch, time = torch.ones_like(keep[0, :, :, 0]).nonzero(as_tuple=True)

    def at(layer: int) -> Callable[[Tensor], RowDelta]:
        values = torch.where(keep[layer, ..., None], torch.nan, means[layer]).flatten(0, 1).flatten(1)
        return lambda _x: RowDelta(batch, time, torch.zeros_like(values), values)

    return {Site("attn_z", layer): at(layer) for layer in range(len(means))}


def _kept(rows: PromptRows, means: Sequence[Tensor], positions: Positions) -> Bool[Tensor, "layers B T heads"]:
    """Where heads are kept in prompts."""
    keep = torch.zeros(len(means), *means[0].shape[:3], dtype=torch.bool, device=rows.ids.device)
    each = torch.arange(len(rows.ids), device=rows.ids.device)
    for (layer, head), names in positions.items():
        for name in names:
            keep[layer, each, rows.positions[name], head] = True
    return keep
