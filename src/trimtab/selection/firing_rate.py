"""How often a feature fires: the control that asks whether frequency alone finds what steers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.selection.criterion import ScoringTarget, StatisticCriterion, feature_stats


@dataclass(frozen=True, kw_only=True)
class FiringRate(StatisticCriterion):
    """Share of the statistics' tokens on which the feature fires."""

    name: ClassVar[str] = "firing-rate"

    def scores(self, target: ScoringTarget) -> Float[Tensor, " n"]:
        stats = feature_stats(target.dictionary, f"criterion {self.name}")
        return torch.as_tensor(stats.firing_rate)[target.features.cpu()]
