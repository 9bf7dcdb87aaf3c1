"""Our masked distribution against TorchRL's own, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchrl.modules import MaskedCategorical

from trimtab.policies.allowed_categorical import AllowedCategorical


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, masks (one row allows one action only, one allows all) and allowed actions."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 9, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.5
    mask[0] = False
    mask[:, 8] = True
    mask[1] = True
    return logits, mask, torch.multinomial(mask.double(), 1, generator=generator)[:, 0]


Quantity = Callable[[MaskedCategorical, Tensor], Tensor]


@pytest.mark.parametrize(
    "quantity",
    [lambda dist, action: dist.log_prob(action), lambda dist, action: dist.entropy()],
    ids=["logp", "entropy"],
)
def test_values_and_gradients_are_torchrls(case: tuple[Tensor, Tensor, Tensor], quantity: Quantity):
    logits, mask, action = case
    found = []
    for kind in (AllowedCategorical, MaskedCategorical):
        leaf = logits.clone().requires_grad_()
        values = quantity(kind(logits=leaf, mask=mask), action)
        (values * torch.arange(1, 7) / 10).sum().backward()  # with weights above 1 TorchRL's own overflows
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        found.append((values.detach(), leaf.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-12)


def test_closed_form():
    dist = AllowedCategorical(torch.tensor([[0.0, 5.0, math.log(3)]]), torch.tensor([[True, False, True]]))
    torch.testing.assert_close(dist.probs, torch.tensor([[0.25, 0.0, 0.75]]))
    assert float(dist.entropy()) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert float(dist.log_prob(torch.tensor([1]))) == -math.inf
    assert dist.mode.tolist() == [2]


def test_draws_are_allowed_only(case: tuple[Tensor, Tensor, Tensor]):
    logits, mask, _ = case
    draws = AllowedCategorical(logits, mask).sample(torch.Size([200]))
    assert mask.expand(200, 6, 9).gather(2, draws[..., None]).all()
    assert (draws[:, 0] == 8).all()
