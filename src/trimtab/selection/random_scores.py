"""Random scores: the control that every other criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.dictionaries.base import Dictionary
from trimtab.selection.criterion import StatisticCriterion


@dataclass(frozen=True, kw_only=True)
class Random(StatisticCriterion):
    """A uniform number in [0, 1) per feature; a feature's number depends on the seed and its id alone."""

    name: ClassVar[str] = "random"

    seed: int = 0
    """Another seed gives another ranking."""

    def scores(self, dictionary: Dictionary, features: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(dictionary.n_features, generator=generator, dtype=torch.float64)[features.cpu()]
