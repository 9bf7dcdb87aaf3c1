"""The weight of a sparsity penalty: fixed, or driven so that rows have the wanted number of active features (L0).

How much sparsity a weight buys depends on the data, the scaling, the width and the recipe; the L0 that is wanted does
not. The control acts on the logarithm of the weight, in proportion to log(L0 / target) and to its integral. L0 follows
the weight with a delay of tens of steps, so that the error is the one expected if L0 goes on as it does: without that,
L0 falls below the target at first, and features die of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.dictionaries.active import DENSE_ABOVE
from trimtab.dictionaries.encoding import exceeded_on
from trimtab.dictionaries.trainable import TrainableConfig, TrainableSAE
from trimtab.errors import UserError

INTEGRAL_SHARE = 0.04
"""Share of the training in which an error that stays multiplies the weight by (L0 / target)."""
PROPORTIONAL = 0.3
"""Power of L0 / target by which the weight answers at once."""
AVERAGED_STEPS, TREND_STEPS = 4, 16
"""Steps over which L0 is averaged, exponentially, and over which again to see where it is going."""
FORESIGHT = 2.0
"""How far the trend is followed ahead, in units of the difference between those two."""
LEAST_STEPS = 30
"""Fewest steps in place of `INTEGRAL_SHARE`, in short trainings."""
LARGEST_ERROR = math.log(2)
"""Largest |log(L0 / target)| that counts: farther away the weight moves no faster."""
LARGEST_MOVE = 0.1
"""Largest change of the weight's logarithm in one step."""
LARGEST_SAMPLE = 2048
"""Rows that the encoder is scaled on."""
START_L0 = 3.0
"""With a target, features that are active at first, as a multiple of it."""
START_WEIGHT = 0.3
"""Where the weight starts, as a share of the size of codes."""


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


class L0Control(nn.Module):
    """Weight of a sparsity penalty. `begin_step`, then read `weight`, then `update` with the L0 that came of it.

    All that changes is in buffers, so that a resumed training goes on exactly. While the weight warms up, the control
    may lower it but not raise it, since the L0 of a weight that is still rising says little.

    Args:
        weight: fixed one; with a target where to start, unless `start` says so from the data.
        target: wanted L0; None keeps the weight.
        warmup_share: share of the training over which the weight rises from 0.
    """

    log_weight: Tensor
    average: Tensor
    trend: Tensor
    moved: Tensor
    seen: Tensor
    done: Tensor
    stride: Tensor

    def __init__(self, weight: float, target: float | None = None, *, warmup_share: float = 0.0) -> None:
        super().__init__()
        self.target, self.warmup_share = target, warmup_share
        log_weight = math.log(weight) if weight > 0 else -math.inf
        state = {
            "log_weight": log_weight,  # the integral part
            "moved": 0.0,  # the proportional part
            "average": 0.0,  # of log L0
            "trend": 0.0,  # the same over more steps
            "seen": 0.0,  # steps that the averages know
            "done": 1.0,  # share of the training before this step; without a schedule there is no warm-up
            "stride": 0.0,  # share of the training that a step is
        }
        for name, value in state.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    @property
    def warmup(self) -> float:
        """How much of the weight counts by now, from 0 to 1."""
        return min(1.0, float(self.done) / self.warmup_share) if self.warmup_share else 1.0

    @property
    def weight(self) -> float:
        """The weight for this step, warm-up included."""
        return self.warmup * math.exp(float(self.log_weight + self.moved))

    def start(self, weight: float) -> None:
        """Begin at another weight, if there is a target; a fixed weight stays."""
        if self.target is not None:
            self.log_weight.fill_(math.log(weight))

    def rescale(self, factor: float) -> None:
        """Multiply the weight, because the penalty's unit has changed."""
        self.log_weight += math.log(factor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Stay on the host, in float64: the state is a few numbers that Python reads at every step."""
        return self

    def begin_step(self, done: float) -> None:
        """Note the share of the training that is done."""
        before = float(self.done)
        self.stride.fill_(max(0.0, done - before) if before < 1 else 0.0)
        self.done.fill_(done)

    def update(self, l0: float) -> None:
        """Move the weight, given this step's mean number of active features per row."""
        if self.target is None:
            return
        log_l0 = math.log(max(l0, 0.01 * self.target))
        self.seen += 1
        self.average += (log_l0 - self.average) / min(float(self.seen), AVERAGED_STEPS)
        self.trend += (log_l0 - self.trend) / min(float(self.seen), TREND_STEPS)
        expected = float(self.average + FORESIGHT * (self.average - self.trend))
        error = expected - math.log(self.target)
        error = max(-LARGEST_ERROR, min(error, LARGEST_ERROR if self.warmup >= 1 else 0.0))
        before = float(self.log_weight + self.moved)
        integral = float(self.log_weight) + error * min(float(self.stride) / INTEGRAL_SHARE, 1 / LEAST_STEPS)
        change = integral + PROPORTIONAL * error - before
        self.log_weight.fill_(integral)
        self.moved.fill_(before + max(-LARGEST_MOVE, min(change, LARGEST_MOVE)) - integral)


class Penalised(TrainableSAE):
    """Base of SAEs whose sparsity comes from a penalty on the size of codes."""

    config: PenalisedConfig
    dense_above: float = DENSE_ABOVE
    """Share of pairs in play above which a step is dense."""
    opening: ClassVar[str] = "b_enc"
    """Name of the bias that decides which features fire."""

    def __init__(self, config: PenalisedConfig, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, d, seed=seed, dtype=dtype)
        weight = 1.0 if config.sparsity_weight is None else config.sparsity_weight
        self.control = L0Control(weight, config.l0, warmup_share=config.sparsity_warmup_share)

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
        opening = self.get_parameter(self.opening)
        if c.l0 is not None:
            share = min(0.5, START_L0 * c.l0 / c.n_features)
            opening.copy_(-exceeded_on(self.encoder_input(sample), self.W_enc_rows, share))
        factor = self._overshoot_mended_by(sample[:LARGEST_SAMPLE])
        self.W_enc_rows.mul_(factor)
        opening.mul_(factor)
        if c.l0 is not None:
            size = (sample - self.b_dec).double().square().sum(1).mean().div(c.l0).sqrt()
            self.control.start(START_WEIGHT * max(float(size), torch.finfo(sample.dtype).tiny))

    def first_codes(self, h: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """The codes from pre-activations that include the bias `opening`, while the other vectors are 0."""
        return h.relu()

    def _overshoot_mended_by(self, sample: Float[Tensor, "m d"]) -> float:
        """The factor a that minimises ‖a·codes·W_dec − (x − b_dec)‖²; 1 where nothing would be gained by one."""
        dot, square = 0.0, 0.0
        bias = self.get_parameter(self.opening)
        for x in sample.split(self.config.block_rows):
            decoded = self.first_codes(torch.addmm(bias, self.encoder_input(x), self.W_enc_rows.T)) @ self.W_dec
            dot += float((decoded * (x - self.b_dec)).sum(dtype=torch.float64))
            square += float(decoded.square().sum(dtype=torch.float64))
        factor = dot / square if square > 0 else 1.0
        return factor if 0 < factor < math.inf else 1.0

    def begin_step(self, done: float) -> None:
        self.control.begin_step(done)

    def knobs(self) -> dict[str, float]:
        return {"sparsity_weight": self.control.weight}
