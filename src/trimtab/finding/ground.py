"""All that a search has in common: model, dictionaries, examples by split, neutral text, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.finding.examples import Examples
from trimtab.finding.first_order import FirstOrder, first_order
from trimtab.finding.neutral import NeutralText
from trimtab.finding.options import FindOptions
from trimtab.finding.scoring import Progress, Scorer, scorer
from trimtab.finding.steering_edit import Part, SteeringEdit, Tables
from trimtab.lm import LanguageModel, PromptCache, Site
from trimtab.runs import Meter
from trimtab.steering import DirectionTable

Measure = Callable[[Tables, Sequence[SteeringEdit], Progress], Tensor]


def fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: on a GPU and a CPU made for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@dataclass(kw_only=True)
class Ground:
    """What is searched, and on what."""

    model: LanguageModel
    saes: Mapping[Site, Dictionary]
    splits: Mapping[str, Examples]
    """`candidates`, `choice` and `report`; `screening` is the first of the choice's."""
    neutral_prompts: Mapping[str, Sequence[str]]
    """By split: `choice` and `report`."""
    options: FindOptions
    meter: Meter = field(default_factory=lambda: Meter("finding"), repr=False)
    _scorers: dict[str, Scorer] = field(default_factory=dict, repr=False)
    _neutral: dict[str, NeutralText] = field(default_factory=dict, repr=False)
    _measured: dict[tuple[str, str, SteeringEdit], Tensor] = field(default_factory=dict, repr=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.saes)

    @cached_property
    def cache(self) -> PromptCache:
        return PromptCache(self.model)

    @cached_property
    def tables(self) -> dict[Site, DirectionTable]:
        """Directions by site: the SAE's features, and behind them the vectors that were added."""
        return {site: DirectionTable.of(sae) for site, sae in self.saes.items()}

    @cached_property
    def live(self) -> dict[Site, Int[Tensor, " m"]]:
        """Features by site that ever fired, as far as that is known."""
        return {site: DirectionTable.of(sae).live_ids() for site, sae in self.saes.items()}

    def add_vector(self, site: Site, vector: Float[Tensor, " d"]) -> Part:
        """A vector as a direction like those of features, at dose 1."""
        self.tables[site] = self.tables[site].with_rows(vector[None])
        return Part(site, self.tables[site].n - 1, 1.0)

    def is_feature(self, part: Part) -> bool:
        """Whether a direction is a feature's."""
        return part.row < self.saes[part.site].n_features

    @cached_property
    def first_order(self) -> dict[Site, FirstOrder]:
        """Of all features, on the candidates' examples."""
        self.meter.describe("gradients of all features")
        return first_order(self.model, self.saes, self.splits["candidates"], cache=self.cache)

    def scorer(self, split: str) -> Scorer:
        """What scores a split's examples."""
        if split not in self._scorers:
            self._scorers[split] = scorer(self.model, self.splits[split], self.sites, self.cache)
        return self._scorers[split]

    def neutral(self, split: str) -> NeutralText:
        """Neutral text of a split."""
        if split not in self._neutral:
            self._neutral[split] = NeutralText(
                self.model, self.neutral_prompts[split], self.options.max_new_tokens, self.sites, self.options.seed,
                self.cache,
            )  # fmt: skip
        return self._neutral[split]

    def effects(self, split: str, edits: Sequence[SteeringEdit], *, exactly: bool = False) -> Float[Tensor, "E X"]:
        """Effects of edits on a split's examples; each is measured once.

        Args:
            split: which.
            edits: what to do.
            exactly: in the model's own precision, as on the report's examples, where choices need less.
        """
        return self._once("exact effects" if exactly else "effects", split, edits, lambda: self.scorer(split).effects)

    def kl(self, split: str, edits: Sequence[SteeringEdit], *, roughly: bool = False) -> Float[Tensor, "E P"]:
        """Divergence of edits on a split's neutral text, in nats per token; as `effects`.

        Args:
            split: which.
            edits: what to do.
            roughly: to look for a dose by, as precisely as choices are made.
        """
        return self._once("rough kl" if roughly else "kl", split, edits, lambda: self.neutral(split).kl)

    def _once(self, what: str, split: str, edits: Sequence[SteeringEdit], measure: Callable[[], Measure]) -> Tensor:
        missing = [edit for edit in dict.fromkeys(edits) if (what, split, edit) not in self._measured]
        if missing:
            # What is reported is measured in the model's own precision; choices need less.
            rough = what == "rough kl" or (split != "report" and what != "exact effects")
            fast = rough and fast_bfloat16(self.model.device)
            measuring = measure()
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=fast):
                found = measuring(self.tables, missing, self.meter.advance)
            self._measured.update({(what, split, edit): row for edit, row in zip(missing, found, strict=True)})
        return torch.stack([self._measured[what, split, edit] for edit in edits])
