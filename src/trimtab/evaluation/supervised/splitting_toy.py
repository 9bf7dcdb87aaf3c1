"""Why sparse autoencoders split a binary feature: a toy with an ideal solution that loses (Makelov et al. 2024).

x = ±μ + ε with ε ~ N(0, I_d). Two units that read ±μ are the ideal description. Yet many units in random directions,
tilted towards ±μ and with a bias that makes them fire seldom, explain some of the noise as well, and have a lower loss
‖x − x̂‖² + λ Σ f at every λ: what is optimised prefers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import Column, Table
from trimtab.stats import Interval, bootstrap_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAMBDAS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
BIASES = tuple(0.1 * step for step in range(0, 41))
TILTS = (0.0, 0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True, kw_only=True)
class SplittingLoss:
    """Both losses at one λ, on rows that chose neither bias nor tilt."""

    weight: float
    """λ."""
    ideal: Interval
    """Of two units that read ±μ, at their best bias."""
    split: Interval
    """Of many random units, at their best bias and tilt."""
    difference: Interval
    """split − ideal, by row."""
    bias: float
    """γ of the random units: they fire above it."""
    tilt: float
    """Their cosine with ±μ."""
    active: float
    """Random units that fire on a row."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SplittingToy(Result):
    """Losses over λ."""

    losses: tuple[SplittingLoss, ...]

    def headline(self) -> str:
        """At how many λ the random units win."""
        below = sum(loss.difference.high < 0 for loss in self.losses)
        return f"random units have a lower loss than the ideal two at {below} of {len(self.losses)} λ"

    def tables(self) -> dict[str, Table]:
        """A row per λ."""
        columns = [
            Column("λ", "weight", "g"), Column("ideal units", "ideal", ".2f"), Column("random units", "split", ".2f"),
            Column("difference", "difference", "+.2f"), Column("bias", "bias", ".1f"), Column("tilt", "tilt", ".2f"),
            Column("active", "active", ".1f"),
        ]  # fmt: skip
        return {"losses": Table(columns=columns, rows=self.losses)}

    def draw(self, ax: Axes) -> None:
        """Both losses over λ."""
        weights = [loss.weight for loss in self.losses]
        curves = [
            Curve("ideal two units", weights, [loss.ideal.estimate for loss in self.losses]),
            Curve("random units", weights, [loss.split.estimate for loss in self.losses]),
        ]
        plot_curves(ax, curves, "loss of a row", steps="λ")


def splitting_toy(
    weights: Sequence[float] = LAMBDAS,
    *,
    d: int = 100,
    norm: float = 2.0,
    n_units: int = 1000,
    rows: int = 2000,
    seed: int = 0,
) -> SplittingToy:
    """Measure both losses.

    Args:
        weights: λ.
        d: dimensions.
        norm: ‖μ‖.
        n_units: random units.
        rows: that choose bias and tilt, and as many that the losses are of.
        seed: of rows and units.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * rows, d, generator=generator)
    x[:, 0] += norm * (2 * torch.randint(2, (2 * rows,), generator=generator) - 1)  # μ is along the first axis
    random = torch.randn(n_units, d, generator=generator)
    found = []
    for weight in weights:
        ideal, (ideal_bias,) = _best(weight, x[:rows], [(_two_units(d), (bias,)) for bias in BIASES])
        units = {tilt: _tilted(random, tilt) for tilt in TILTS}
        split, (bias, tilt) = _best(weight, x[:rows], [(units[t], (b, t)) for t in TILTS for b in BIASES])
        ideal_loss, split_loss = (_losses(x[rows:], u, b, weight) for u, b in ((ideal, ideal_bias), (split, bias)))
        found.append(
            SplittingLoss(
                weight=weight,
                ideal=bootstrap_mean(ideal_loss.numpy()),
                split=bootstrap_mean(split_loss.numpy()),
                difference=bootstrap_mean((split_loss - ideal_loss).numpy()),
                bias=bias,
                tilt=tilt,
                active=float((x[rows:] @ split.T > bias).sum(1).double().mean()),
            )
        )
    return SplittingToy(losses=tuple(found))


def _two_units(d: int) -> Float[Tensor, "2 d"]:
    axis = torch.eye(d)[0]
    return torch.stack([axis, -axis])


def _tilted(random: Float[Tensor, "n d"], tilt: float) -> Float[Tensor, "n d"]:
    """Unit rows with a cosine to μ or to −μ, half of them each."""
    rest = random.clone()
    rest[:, 0] = 0
    rest = rest / rest.norm(dim=1, keepdim=True) * (1 - tilt**2) ** 0.5
    rest[:, 0] = tilt
    rest[1::2, 0] *= -1
    return rest


def _losses(x: Float[Tensor, "P d"], units: Float[Tensor, "n d"], bias: float, weight: float) -> Float[Tensor, " P"]:
    """‖x − x̂‖² + λ Σ f by row, of units that read and write the same direction."""
    f = (x @ units.T - bias).relu()
    return (x - f @ units).square().sum(1) + weight * f.sum(1)


def _best(
    weight: float, x: Float[Tensor, "P d"], candidates: Sequence[tuple[Tensor, tuple[float, ...]]]
) -> tuple[Tensor, tuple[float, ...]]:
    return min(candidates, key=lambda one: float(_losses(x, one[0], one[1][0], weight).mean()))
