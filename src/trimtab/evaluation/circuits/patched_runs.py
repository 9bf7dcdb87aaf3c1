"""Runs in which some heads read or write other values than they did, from the first of them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.evaluation.circuits.rows import PlainRun, PromptRows
from trimtab.lm import LanguageModel, RowDelta, Site, TokenBatch, capture, edited
from trimtab.lm.cache import GrowingCache
from trimtab.lm.layouts import head_count
from trimtab.lm.upper_layers import starting_at


class Location(NamedTuple):
    """A site at a position: what a head reads (queries, keys, values) or gives (`attn_z`) there."""

    site: Site
    position: str

    def __str__(self) -> str:
        return f"{self.site} at {self.position}"


def head_location(model: LanguageModel, kind: str, layer: int, head: int, position: str) -> Location:
    """Where a query head reads or gives something. Keys and values of grouped-query attention are its group's.

    Args:
        model: the model.
        kind: `attn_q`, `attn_k`, `attn_v` or `attn_z`.
        layer: its layer.
        head: among the query heads.
        position: of the token.

    Raises:
        UserError: there is no such head.
    """
    query = model.site(Site("attn_q", layer, head))
    assert query.head is not None
    if kind in ("attn_q", "attn_z"):
        return Location(query._replace(kind=kind), position)
    found = model.layout.layers[layer]
    group = head_count(found, query) // head_count(found, Site(kind, layer))
    return Location(Site(kind, layer, query.head // group), position)


class PatchedRuns:
    """Runs of copies of prompts with other values at some locations, behind the cached clean run of what precedes them.

    Args:
        model: the model.
        rows: B prompts.
        clean: their plain run.
        locations: all that will be patched.
        copies: of each prompt, side by side.
        cache: keys and values of the plain run, if there are some; copies of them need one of their own.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: PromptRows,
        clean: PlainRun,
        locations: Sequence[Location],
        copies: int,
        cache: GrowingCache | None = None,
    ) -> None:
        self.model, self.copies, self.clean = model, copies, clean
        self.start = int(min(rows.positions[location.position].min() for location in locations))
        self.time = {r: (rows.positions[r.position] - self.start).repeat_interleave(copies) for r in locations}
        self.end = (rows.positions["END"] - self.start).repeat_interleave(copies)
        self.batch = TokenBatch.full(rows.ids[:, self.start :].repeat_interleave(copies, 0))
        self.cache = None
        if self.start and cache is not None and copies == 1:
            self.cache = cache.frozen(self.start)
        elif self.start:
            cache = model.new_cache()
            model.forward(TokenBatch.full(rows.ids[:, : self.start]), cache=cache, last=1)
            cache.repeat(copies)
            self.cache = cache.frozen()

    def run(self, read: Mapping[Location, Float[Tensor, "N width"]]) -> Float[Tensor, "N d"]:
        """The residual behind the last layer at the last token; gradients reach what is read.

        Raises:
            UserError: a value that is not finite.
        """
        for location, values in read.items():
            if not values.isfinite().all():  # an edit with a NaN leaves its row as it is, which would look perfect
                n, hint = int((~values.isfinite()).any(-1).sum()), "check the dictionary that gave them"
                raise UserError(f"values for {location}", f"{n} of {len(values)} rows are not finite", hint)
        at_site: dict[Site, list[Location]] = {}
        for location in read:
            at_site.setdefault(location.site, []).append(location)
        number = torch.arange(len(self.end), device=self.end.device)

        def change(site: Site) -> Callable[[Tensor], RowDelta]:
            here = at_site[site]
            values = torch.cat([read[location] for location in here])
            batch, time = number.repeat(len(here)), torch.cat([self.time[location] for location in here])
            return lambda _x: RowDelta(batch, time, torch.zeros_like(values), values)

        layer, last = min(site.layer for site in at_site), Site("resid_post", self.model.n_layers - 1)
        hidden = self.clean.inputs[layer][:, self.start :].repeat_interleave(self.copies, 0)
        with starting_at(self.model, layer, hidden), edited(self.model, {site: change(site) for site in at_site}):
            final = capture(self.model, self.batch, [last], cache=self.cache, gradients=True)[last]
        return final[number, self.end]
