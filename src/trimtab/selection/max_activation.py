"""How strongly a feature ever fired: m_i, the control that asks whether strength alone finds what steers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.selection.criterion import ScoringTarget, StatisticCriterion, feature_stats


@dataclass(frozen=True, kw_only=True)
class MaxActivation(StatisticCriterion):
    """Largest activation over the statistics' corpus, in model units."""

    name: ClassVar[str] = "max-activation"

    def scores(self, target: ScoringTarget) -> Float[Tensor, " n"]:
        stats = feature_stats(target.dictionary, f"criterion {self.name}")
        return torch.as_tensor(stats.max_activation)[target.features.cpu()]
