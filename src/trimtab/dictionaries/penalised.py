"""What SAEs with a sparsity penalty share in training: its weight is fixed or driven to an L0 target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.dictionaries.active import DENSE_ABOVE
from trimtab.dictionaries.l0_control import L0Control
from trimtab.dictionaries.trainable import TrainableConfig, TrainableSAE
from trimtab.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PenalisedConfig(TrainableConfig):
    """What the training of SAEs with a sparsity penalty has in common. Either `l0` or `sparsity_weight` is given."""

    l0: float | None = None
    """Wanted number of active features per row, on average; drives the weight of the sparsity penalty."""
    sparsity_weight: float | None = None
    """Fixed weight of the sparsity penalty instead, for rows as they are scaled: a value for one scaling is wrong for
    another."""
    sparsity_warmup_share: float = 0.1
    """Share of the training over which the weight of the sparsity penalty rises from 0; a penalty that is there at once
    kills features before they have learnt anything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.l0 is None) == (self.sparsity_weight is None):
            raise UserError(
                f"l0 {self.l0} with sparsity_weight {self.sparsity_weight}",
                "a sparsity penalty has either a target or a fixed weight",
                "give one of the two",
            )
        last = self.n_features - 1
        ok = self.l0 is None or 0 < self.l0 <= last
        self.check("l0", ok, f"it must be above 0 and at most n_features − 1 = {last}", "choose another")
        ok = self.sparsity_weight is None or 0 <= self.sparsity_weight < math.inf
        self.check("sparsity_weight", ok, "it must not be negative", "set it to 0 or more")
        self.check(
            "sparsity_warmup_share", 0 <= self.sparsity_warmup_share < 1, "a share is from 0 to below 1", "set it so"
        )

    @property
    def weight_target(self) -> float | None:
        """The L0 that the penalty's weight is driven to; None where the weight is fixed."""
        return self.l0


class Penalised(TrainableSAE):
    """Base of SAEs whose sparsity comes from a penalty; `control.weight` is its weight in this step."""

    config: PenalisedConfig
    dense_above: float = DENSE_ABOVE
    """Share of active pairs above which a step is dense."""

    def __init__(self, config: PenalisedConfig, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, d, seed=seed, dtype=dtype)
        weight = 1.0 if config.sparsity_weight is None else config.sparsity_weight
        self.control = L0Control(weight, config.weight_target, warmup_share=config.sparsity_warmup_share)

    def set_progress(self, done: float) -> None:
        self.control.set_progress(done)

    def after_step(self, codes: Tensor, l0: float) -> None:
        self.control.update(l0)

    def metrics(self) -> dict[str, float]:
        return {"sparsity_weight": self.control.weight}
