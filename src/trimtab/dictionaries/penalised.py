"""What SAEs with a sparsity penalty share in training: its weight is fixed or driven to an L0 target.

ReLU, p-annealing and Gated SAEs, whose penalty is on the size of codes, also share a start from which the target is
approached from above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries.encoding import exceeded_on
from trimtab.dictionaries.l0_control import L0Control
from trimtab.dictionaries.trainable import TrainableConfig, TrainableSAE
from trimtab.errors import UserError
from trimtab.runs import check_values

LARGEST_SAMPLE = 2048
"""Rows that the encoder is scaled on."""
START_L0 = 3.0
"""With a target, features that are active at first, as a multiple of it."""
START_WEIGHT = 0.3
"""Where the penalty's weight starts, as a share of the size of codes."""


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
        check_values(self, f"above 0 and at most n_features − 1 = {last}", lambda l0: 0 < l0 <= last, "l0")
        check_values(self, "at least 0 and finite", lambda weight: 0 <= weight < math.inf, "sparsity_weight")
        check_values(self, "from 0 to below 1", lambda share: 0 <= share < 1, "sparsity_warmup_share")

    @property
    def weight_target(self) -> float | None:
        """The L0 that the penalty's weight is driven to; None where the weight is fixed."""
        return self.l0


class Penalised(TrainableSAE):
    """Base of SAEs whose sparsity comes from a penalty; `control.weight` is its weight in this step."""

    config: PenalisedConfig

    def __init__(self, config: PenalisedConfig, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, d, seed=seed, dtype=dtype)
        weight = 1.0 if config.sparsity_weight is None else config.sparsity_weight
        self.control = L0Control(weight, config.weight_target, warmup_share=config.sparsity_warmup_share)

    def set_progress(self, done: float) -> None:
        self.control.set_progress(done)

    def after_step(self, codes: Tensor, l0: Float[Tensor, ""]) -> None:
        self.control.update(l0)

    def metrics(self) -> dict[str, float]:
        return {"sparsity_weight": float(self.control.weight)}


class ReLULike(Penalised):
    """Base of SAEs whose penalty is on the size of codes."""

    firing_bias: ClassVar[str] = "b_enc"
    """Name of the bias that decides which features fire."""

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "m d"]) -> None:
        """Set b_dec, the encoder's bias and length and, with a target, where the weight starts.

        With a target the bias lets each feature fire on `START_L0` times l0 / n of the rows, so that steps are sparse
        from the start and the target is still approached from above. Whatever fires at first, W_enc = W_decᵀ of unit
        norm decodes to many times the rows or to a part of them; the encoder is scaled so that it gives them back as
        well as it can.

        A penalty on codes is in the unit of the rows. Were l0 codes of equal size to explain all of x − b_dec, each
        would be √(E‖x − b_dec‖² / l0); the weight starts at `START_WEIGHT` times that, whatever the scaling.
        """
        super().initialise(sample)
        c = self.config
        bias = self.get_parameter(self.firing_bias)
        if c.l0 is not None:
            share = min(0.5, START_L0 * c.l0 / c.n_features)
            bias.copy_(-exceeded_on(self.encoder_input(sample), self.W_enc_rows, share))
        factor = self._best_scale(sample[:LARGEST_SAMPLE])
        self.W_enc_rows.mul_(factor)
        bias.mul_(factor)
        if c.l0 is not None:
            size = (sample - self.b_dec).double().square().sum(1).mean().div(c.l0).sqrt()
            self.control.start(START_WEIGHT * max(float(size), torch.finfo(sample.dtype).tiny))

    def first_codes(self, h: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """The codes from pre-activations that include `firing_bias`, while the other vectors are 0."""
        return h.relu()

    def _best_scale(self, sample: Float[Tensor, "m d"]) -> float:
        """The factor a that minimises ‖a·codes·W_dec − (x − b_dec)‖²; 1 where nothing would be gained by one."""
        dot, square = 0.0, 0.0
        bias = self.get_parameter(self.firing_bias)
        for x in sample.split(self.config.block_rows):
            decoded = self.first_codes(torch.addmm(bias, self.encoder_input(x), self.W_enc_rows.T)) @ self.W_dec
            dot += float((decoded * (x - self.b_dec)).sum(dtype=torch.float64))
            square += float(decoded.square().sum(dtype=torch.float64))
        factor = dot / square if square > 0 else 1.0
        return factor if 0 < factor < math.inf else 1.0
