"""All that a search has in common: model, dictionaries, examples by split, neutral text, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.finding.examples import Examples
from trimtab.finding.first_order import FirstOrder, first_order
from trimtab.finding.neutral import NeutralText
from trimtab.finding.options import FindOptions
from trimtab.finding.scoring import Progress, Scorer, scorer
from trimtab.finding.steering_edit import SteeringEdit, Tables
from trimtab.lm import LanguageModel, PromptCache, Site
from trimtab.runs import Meter
from trimtab.steering import DirectionTable

TabledEdit = tuple[SteeringEdit, Tables]
Measure = Callable[[Tables, Sequence[SteeringEdit], Progress], Tensor]


@dataclass(kw_only=True)
class Ground:
    """What is searched, and on what."""

    model: LanguageModel
    saes: Mapping[Site, Dictionary]
    splits: Mapping[str, Examples]
    """`candidates`, `choice` and `report`."""
    neutral_prompts: Mapping[str, Sequence[str]]
    """By split: `choice` and `report`."""
    options: FindOptions
    meter: Meter = field(default_factory=lambda: Meter("finding"), repr=False)
    _measured: dict[tuple[str, str, SteeringEdit], Tensor] = field(default_factory=dict, repr=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.saes)

    @cached_property
    def cache(self) -> PromptCache:
        return PromptCache(self.model)

    @cached_property
    def tables(self) -> dict[Site, DirectionTable]:
        """The SAEs' features as directions."""
        return {site: DirectionTable.of(sae) for site, sae in self.saes.items()}

    @cached_property
    def first_order(self) -> dict[Site, FirstOrder]:
        """Of all features, on the candidates' examples."""
        self.meter.describe("gradients of all features")
        return first_order(self.model, self.saes, self.splits["candidates"], cache=self.cache)

    @cached_property
    def _scorers(self) -> dict[str, Scorer]:
        return {}

    def scorer(self, split: str) -> Scorer:
        """What scores a split's examples."""
        if split not in self._scorers:
            self._scorers[split] = scorer(self.model, self.splits[split], self.sites, self.cache)
        return self._scorers[split]

    @cached_property
    def _neutral(self) -> dict[str, NeutralText]:
        return {}

    def neutral(self, split: str) -> NeutralText:
        """Neutral text of a split."""
        if split not in self._neutral:
            # As long in both: divergence per token grows along a text, as edits stay in the cache.
            tokens, seed = self.options.max_new_tokens, self.options.seed
            self._neutral[split] = NeutralText(
                self.model, self.neutral_prompts[split], tokens, self.sites, seed, self.cache
            )
        return self._neutral[split]

    def effects(self, split: str, edits: Sequence[SteeringEdit], tables: Tables | None = None) -> Float[Tensor, "E X"]:
        """Effects of edits on a split's examples; those of features are measured once.

        Args:
            split: which.
            edits: what to do.
            tables: of directions, if they are not the features'.
        """
        return self._once("effects", split, self.scorer(split).effects, edits, tables)

    def kl(self, split: str, edits: Sequence[SteeringEdit], tables: Tables | None = None) -> Float[Tensor, "E P"]:
        """Divergence of edits on a split's neutral text, in nats per token; as `effects`."""
        return self._once("kl", split, self.neutral(split).kl, edits, tables)

    def of_all(self, what: Literal["effects", "kl"], split: str, edits: Sequence[TabledEdit]) -> list[Tensor]:
        """One of the two for edits along directions of several tables, those of one table side by side."""
        measure = self.effects if what == "effects" else self.kl
        groups: dict[int, list[int]] = {}
        for i, (_, tables) in enumerate(edits):
            groups.setdefault(id(tables), []).append(i)
        found: list[Tensor] = [torch.empty(0)] * len(edits)
        for members in groups.values():
            values = measure(split, [edits[i][0] for i in members], edits[members[0]][1])
            for i, row in zip(members, values, strict=True):
                found[i] = row
        return found

    def _once(
        self, what: str, split: str, measure: Measure, edits: Sequence[SteeringEdit], tables: Tables | None
    ) -> Tensor:
        if tables is not None and tables is not self.tables:
            return measure(tables, edits, self.meter.advance)
        missing = [edit for edit in dict.fromkeys(edits) if (what, split, edit) not in self._measured]
        if missing:
            found = measure(self.tables, missing, self.meter.advance)
            self._measured.update({(what, split, edit): row for edit, row in zip(missing, found, strict=True)})
        return torch.stack([self._measured[what, split, edit] for edit in edits])
