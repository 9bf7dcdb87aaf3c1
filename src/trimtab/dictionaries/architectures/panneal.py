"""p-annealing: a ReLU SAE whose penalty Σ f^p goes from p = 1 towards 0 in training (Karvonen et al. 2024, 2408.00113).

L1 shrinks every code by the same amount; the smaller p, the less large codes are shrunk and the more small ones are.
The result is a ReLU SAE like any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries.active import Values
from trimtab.dictionaries.architectures.standard import ReLUConfig, TrainableReLU
from trimtab.runs import check_least, check_values

LINEAR_BELOW = 0.1
"""Codes below this share of the rows' spread along one direction, √(E‖x − b_dec‖² / d), are penalised linearly."""
SETTLED_SHARE = 0.375
"""Share of what is left after `p_start_share` in which p keeps its last value, so that an L0 target is met with it."""


@dataclass(frozen=True, kw_only=True)
class PAnnealConfig(ReLUConfig):
    """Training of a ReLU SAE with p-annealing. As with L1, nothing revives dead features."""

    p_end: float = 0.2
    """Last p."""
    p_start_share: float = 0.2
    """Share of the training at which p changes first."""
    p_steps: int = 10
    """Changes of p, equal in size and in distance; the last comes when three eighths of what is left after
    `p_start_share` remains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self, "above 0 and at most 1", lambda p: 0 < p <= 1, "p_end")
        check_values(self, "from 0 to below 1", lambda share: 0 <= share < 1, "p_start_share")
        check_least(self, 1, "p_steps")


class TrainablePAnneal(TrainableReLU):
    """p-annealing: the loss of a ReLU SAE with another penalty.

    The penalty of a code of size f is f·max(f, c)^(p − 1): f^p, but a straight line to 0 below a small c, whose slope
    is finite. When p changes, the weight is multiplied by the ratio of the old to the new sum of penalties over the
    codes of that batch, so that the penalty keeps its size; an L0 target goes on driving it from there.
    """

    architecture = "panneal"
    config_class = PAnnealConfig
    on_host = ("p", "linear_below")
    config: PAnnealConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    p: Tensor
    linear_below: Tensor

    def __init__(self, config: PAnnealConfig, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, d, seed=seed, dtype=dtype)
        self.next_p = 1.0
        self.register_buffer("p", torch.ones((), dtype=torch.float64))
        self.register_buffer("linear_below", torch.tensor(LINEAR_BELOW, dtype=torch.float64))

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "m d"]) -> None:
        """Set b_dec, where the weight starts, and what a small code is."""
        super().initialise(sample)
        spread = float((sample - self.b_dec).double().square().mean().sqrt())
        self.linear_below.fill_(LINEAR_BELOW * max(spread, torch.finfo(sample.dtype).tiny))

    def penalty(self, size: Values) -> Values:
        """f^p, but f·c^(p − 1) below c."""
        return size * size.clamp_min(float(self.linear_below)).pow(float(self.p) - 1)

    def penalty_slope(self, size: Values) -> Values:
        p, c = float(self.p), float(self.linear_below)
        slope = size.clamp_min(c).pow_(p - 1)
        return torch.where(size > c, p * slope, slope)

    def set_progress(self, done: float) -> None:
        super().set_progress(done)
        c = self.config
        annealed = (done - c.p_start_share) / (1 - c.p_start_share) / (1 - SETTLED_SHARE)
        changes = 0 if annealed < 0 else min(c.p_steps, 1 + math.floor(annealed * (c.p_steps - 1) + 1e-9))
        self.next_p = 1 - (1 - c.p_end) * changes / c.p_steps

    @torch.no_grad()
    def before_step(self, x: Float[Tensor, "B d"]) -> None:
        """Change p where it is time to, and the weight so that the penalty of this batch keeps its size."""
        if self.next_p == float(self.p):
            return
        active = self.active(x)
        size = active.h * active.of_feature(self.norms()) if self.free else active.h
        before = active.total(self.penalty(size)).double()
        self.p.fill_(self.next_p)
        after = active.total(self.penalty(size)).double()
        self.control.rescale(torch.where((before > 0) & (after > 0), before / after, 1.0))

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "p": float(self.p)}
