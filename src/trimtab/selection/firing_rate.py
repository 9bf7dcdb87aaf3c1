"""How often a feature fires: the control that asks whether frequency alone finds what steers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.dictionaries.base import Dictionary
from trimtab.selection.criterion import feature_stats, settings_label


@dataclass(frozen=True, kw_only=True)
class FiringRate:
    """Share of the statistics' tokens on which the feature fires."""

    name: ClassVar[str] = "firing-rate"
    signed: ClassVar[bool] = False

    @property
    def label(self) -> str:
        return settings_label(self)

    def scores(self, dictionary: Dictionary, features: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        return torch.as_tensor(feature_stats(dictionary, f"criterion {self.name}").firing_rate)[features.cpu()]
