"""Adam with clipping against torch's own clipping and unfused Adam."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.training.optimiser import Adam


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(7, 5)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_steps_are_those_of_torch(clip_norm: float) -> None:
    ours, reference = module(), module()
    adam = Adam(ours, betas=(0.9, 0.99), clip_norm=clip_norm)
    torch_adam = torch.optim.Adam(reference.parameters(), betas=(0.9, 0.99), fused=False, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip_norm or float("inf"))
        for group in torch_adam.param_groups:
            group["lr"] = 0.01 * (step + 1)
        torch_adam.step()
        assert adam.step(0.01 * (step + 1)) == pytest.approx(float(expected))
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    ours, before = module(), module()
    adam = Adam(ours, betas=(0.9, 0.99), clip_norm=1.0)
    for p in ours.parameters():
        p.grad = torch.full_like(p, torch.nan)
    assert not adam.step(0.1) < float("inf")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), before.parameters(), strict=True))
