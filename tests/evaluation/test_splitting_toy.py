"""The toy's losses against their integrals; random units win at every λ, and do not where noise is gone."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad

from trimtab.evaluation.supervised.splitting_toy import _losses, _tilted, _two_units, splitting_toy
from trimtab.runs.figures import svg


@pytest.fixture(scope="module")
def toy() -> object:
    return splitting_toy((1.0, 4.0, 7.0), rows=300, n_units=1000)


def test_the_ideal_loss_is_its_integral() -> None:
    """d − 1 for the noise beside μ; along it t² where a unit fires and p² elsewhere, and λ (p − t)."""
    weight, bias = 2.0, 1.0

    def along(p: float) -> float:
        density = 0.5 * sum(math.exp(-((p - s * 2) ** 2) / 2) for s in (1, -1)) / math.sqrt(2 * math.pi)
        return density * (bias**2 + weight * (abs(p) - bias) if abs(p) > bias else p**2)

    expected = 99 + quad(along, -12, 12, points=(-bias, bias))[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 100, generator=generator)
    x[:, 0] += 2.0 * (2 * torch.randint(2, (40_000,), generator=generator) - 1)
    assert float(_losses(x, _two_units(100), bias, weight).mean()) == pytest.approx(expected, abs=0.3)


def test_units_are_tilted_and_of_norm_one() -> None:
    units = _tilted(torch.randn(8, 20, generator=torch.Generator().manual_seed(1)), 0.3)
    assert units.norm(dim=1).tolist() == pytest.approx([1] * 8)
    assert units[:, 0].tolist() == pytest.approx([0.3, -0.3] * 4)


def test_random_units_win_at_every_weight(toy: object) -> None:
    losses = toy.losses  # type: ignore[attr-defined]
    assert all(loss.difference.high < 0 for loss in losses)
    assert [loss.bias for loss in losses] == sorted(loss.bias for loss in losses)
    assert "at 3 of 3 λ" in toy.headline()  # type: ignore[attr-defined]


def test_few_random_units_do_not() -> None:
    """Two random units explain nearly nothing of ±μ or the noise."""
    (loss,) = splitting_toy((1.0,), rows=300, n_units=2).losses
    assert loss.difference.low > 0


def test_both_losses_are_drawn(toy: object) -> None:
    drawing = svg(toy.draw, "losses")  # type: ignore[attr-defined]
    assert drawing == svg(toy.draw, "losses")  # type: ignore[attr-defined]
    assert "ideal two units" in drawing
    assert "random units" in drawing
