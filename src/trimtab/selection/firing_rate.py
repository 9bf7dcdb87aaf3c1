"""How often a feature fires: the control that asks whether frequency alone finds what steers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.dictionaries.base import Dictionary
from trimtab.selection.criterion import StatisticCriterion, feature_stats


@dataclass(frozen=True, kw_only=True)
class FiringRate(StatisticCriterion):
    """Share of the statistics' tokens on which the feature fires."""

    name: ClassVar[str] = "firing-rate"

    def scores(self, dictionary: Dictionary, features: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        return torch.as_tensor(feature_stats(dictionary, f"criterion {self.name}").firing_rate)[features.cpu()]
