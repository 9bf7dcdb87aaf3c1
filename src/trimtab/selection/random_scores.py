"""Random scores: the control that every other criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.selection.criterion import ScoringTarget, StatisticCriterion


@dataclass(frozen=True, kw_only=True)
class Random(StatisticCriterion):
    """A uniform number in [0, 1) per feature; a feature's number depends on the seed and its id alone."""

    name: ClassVar[str] = "random"

    seed: int = 0
    """Another seed gives another ranking."""

    def scores(self, target: ScoringTarget) -> Float[Tensor, " n"]:
        generator = torch.Generator().manual_seed(self.seed)
        every = torch.rand(target.dictionary.n_features, generator=generator, dtype=torch.float64)
        return every[target.features.cpu()]
