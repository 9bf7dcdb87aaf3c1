"""How strongly a feature ever fired: m_i, the control that asks whether strength alone finds what steers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.dictionaries.base import Dictionary
from trimtab.selection.criterion import StatisticCriterion, feature_stats


@dataclass(frozen=True, kw_only=True)
class MaxActivation(StatisticCriterion):
    """Largest activation over the statistics' corpus, in model units."""

    name: ClassVar[str] = "max-activation"

    def scores(self, dictionary: Dictionary, features: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        return torch.as_tensor(feature_stats(dictionary, f"criterion {self.name}").max_activation)[features.cpu()]
