"""All that a search has in common: model, dictionaries, examples by split, neutral text, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.finding.examples import Examples
from trimtab.finding.first_order import FirstOrder, first_order
from trimtab.finding.neutral import Continued, NeutralText, continued
from trimtab.finding.options import FindOptions
from trimtab.finding.scoring import Progress, Scorer, scorer
from trimtab.finding.steering_edit import Part, SteeringEdit, Tables
from trimtab.lm import LanguageModel, PromptCache, Site
from trimtab.runs import Meter
from trimtab.steering import DirectionTable

Measure = Callable[[Tables, Sequence[SteeringEdit], Progress], Tensor]


@dataclass(kw_only=True)
class Ground:
    """What is searched, and on what."""

    model: LanguageModel
    quick_model: LanguageModel | None = None
    """The same in lower precision, where that is faster."""
    own: Ground | None = field(default=None, repr=False)
    """Of a quick ground, the one that it was made from."""
    saes: Mapping[Site, Dictionary]
    splits: Mapping[str, Examples]
    """`candidates`, `choice` and `report`; `screening` is the first of the choice's."""
    neutral_prompts: Mapping[str, Sequence[str]]
    """By split: `choice` and `report`."""
    options: FindOptions
    meter: Meter = field(default_factory=lambda: Meter("finding"), repr=False)
    tables: dict[Site, DirectionTable] = field(default_factory=dict, repr=False)
    """Directions by site: the SAE's features, and behind them the vectors that were added."""
    written: dict[str, Continued] = field(default_factory=dict, repr=False)
    """What the model wrote behind neutral prompts, by split."""
    _scorers: dict[str, Scorer] = field(default_factory=dict, init=False, repr=False)
    _neutral: dict[str, NeutralText] = field(default_factory=dict, init=False, repr=False)
    _measured: dict[tuple[str, str, SteeringEdit], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.tables:
            self.tables.update({site: DirectionTable.of(sae) for site, sae in self.saes.items()})
        if not self.written:
            texts = continued(self.model, self.neutral_prompts, self.options.max_new_tokens, self.options.seed)
            self.written.update(texts)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.saes)

    @cached_property
    def cache(self) -> PromptCache:
        return PromptCache(self.model, together=True)

    @cached_property
    def quick(self) -> Ground:
        """The same with the quick model, if there is one: what choices are made on. It shares directions and text."""
        model = self.quick_model
        return self if model is None or model is self.model else replace(self, model=model, quick_model=None, own=self)

    @property
    def exact(self) -> Ground:
        """In the model's own precision: what gradients are taken on, whose differences are small, and the report."""
        return self.own or self

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
        if self.own is not None:
            return self.own.first_order
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
            self._neutral[split] = NeutralText(self.model, self.written[split], self.sites, self.cache)
        return self._neutral[split]

    def effects(self, split: str, edits: Sequence[SteeringEdit]) -> Float[Tensor, "E X"]:
        """Effects of edits on a split's examples; each is measured once."""
        return self._once("effects", split, edits, lambda: self.scorer(split).effects)

    def kl(self, split: str, edits: Sequence[SteeringEdit]) -> Float[Tensor, "E P"]:
        """Divergence of edits on a split's neutral text, in nats per token; each is measured once."""
        return self._once("kl", split, edits, lambda: self.neutral(split).kl)

    def _once(self, what: str, split: str, edits: Sequence[SteeringEdit], measure: Callable[[], Measure]) -> Tensor:
        missing = [edit for edit in dict.fromkeys(edits) if (what, split, edit) not in self._measured]
        if missing:
            found = measure()(self.tables, missing, self.meter.advance)
            self._measured.update({(what, split, edit): row for edit, row in zip(missing, found, strict=True)})
        return torch.stack([self._measured[what, split, edit] for edit in edits])
