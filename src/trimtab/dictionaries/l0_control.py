"""The weight of a sparsity penalty: fixed, or driven so that rows have the wanted number of active features (L0).

How much sparsity a weight buys depends on the data, the scaling, the width and the recipe; the L0 that is wanted does
not. The control acts on the logarithm of the weight, in proportion to log(L0 / target) and to its integral. L0 follows
the weight with a delay of tens of steps, so that the error is the one expected if L0 goes on as it does: without that,
L0 falls below the target at first, and features die of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

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


class L0Control(nn.Module):
    """Weight of a sparsity penalty. `set_progress`, then read `weight`, then `update` with the L0 that came of it.

    All that changes is in buffers, so that a resumed training goes on exactly. They are where L0 is counted, and Python
    reads none of them, so that no step waits for one and a step that is replayed as a graph goes by them. While the
    weight warms up, the control may lower it but not raise it, since the L0 of a weight that is still rising says
    little.

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
    def warmup(self) -> Float[Tensor, ""]:
        """How much of the weight counts by now, from 0 to 1."""
        return (self.done / self.warmup_share).clamp_max(1.0) if self.warmup_share else torch.ones_like(self.done)

    @property
    def weight(self) -> Float[Tensor, ""]:
        """The weight for this step, warm-up included, in float64."""
        return self.warmup * _exp(self.log_weight + self.moved)

    def start(self, weight: float) -> None:
        """Begin at another weight, if there is a target; a fixed weight stays."""
        if self.target is not None:
            self.log_weight.fill_(math.log(weight))

    def rescale(self, factor: Float[Tensor, ""] | float) -> None:
        """Multiply the weight, because the penalty's unit has changed."""
        self.log_weight += _log(torch.as_tensor(factor, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Stay in float64 on another device."""
        device = fn(torch.empty(0, device=self.log_weight.device)).device
        device = torch.device("cpu") if device.type == "mps" else device  # where there is no float64
        for name, buffer in self.named_buffers():
            self._buffers[name] = buffer.to(device)
        return self

    def set_progress(self, done: float) -> None:
        """Note the share of the training that is done."""
        self.stride.copy_(torch.where(self.done < 1, (done - self.done).clamp_min(0.0), 0.0))
        self.done.fill_(done)

    def update(self, l0: Float[Tensor, ""] | float) -> None:
        """Move the weight, given this step's mean number of active features per row."""
        if self.target is None:
            return
        log_l0 = _log(torch.as_tensor(l0, dtype=torch.float64).clamp_min(0.01 * self.target))
        self.seen += 1
        self.average += (log_l0 - self.average) / self.seen.clamp_max(AVERAGED_STEPS)
        self.trend += (log_l0 - self.trend) / self.seen.clamp_max(TREND_STEPS)
        expected = self.average + FORESIGHT * (self.average - self.trend)
        error = expected - math.log(self.target)
        error = error.clamp(-LARGEST_ERROR, LARGEST_ERROR)
        error = torch.where(self.warmup >= 1, error, error.clamp_max(0.0))
        before = self.log_weight + self.moved
        integral = self.log_weight + error * (self.stride / INTEGRAL_SHARE).clamp_max(1 / LEAST_STEPS)
        change = integral + PROPORTIONAL * error - before
        self.log_weight.copy_(integral)
        self.moved.copy_(before + change.clamp(-LARGEST_MOVE, LARGEST_MOVE) - integral)


def _exp(x: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """eˣ; on a CPU Python's, whose last bit torch's now and then differs from, so that old trainings go on alike."""
    return x.exp() if x.device.type != "cpu" else x.new_tensor(math.exp(x))


def _log(x: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The logarithm, in the same way."""
    return x.log() if x.device.type != "cpu" else x.new_tensor(math.log(x))
