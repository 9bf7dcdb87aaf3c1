"""The controller of the sparsity weight, against plants whose answer is known."""

from __future__ import annotations

import pytest
import torch

from trimtab.dictionaries.l0_control import L0Control


def test_a_fixed_weight_only_warms_up() -> None:
    control = L0Control(2.0, warmup_share=0.2)
    weights = []
    for done in (0.0, 0.1, 0.2, 0.9):
        control.begin_step(done)
        weights.append(control.weight)
        control.update(1000.0)
    assert weights == pytest.approx([0.0, 1.0, 2.0, 2.0])
    control.start(7.0)
    assert control.weight == pytest.approx(2.0)


@pytest.mark.parametrize("steps", [500, 3000])
@pytest.mark.parametrize("target", [10.0, 64.0, 250.0])
def test_a_slow_plant_ends_at_the_target(steps: int, target: float) -> None:
    """L0 relaxes to 40/weight within 30 steps, more slowly as the learning rate falls; noise of 3%."""
    control = L0Control(1.0, target, warmup_share=0.1)
    generator = torch.Generator().manual_seed(0)
    l0 = 500.0
    for step in range(steps):
        control.begin_step(step / steps)
        lr = min(1.0, (steps - step) / (0.3 * steps))
        l0 += (40 / max(control.weight, 0.08) - l0) * lr / 30
        control.update(l0 * (1 + 0.03 * float(torch.randn((), generator=generator))))
    assert l0 == pytest.approx(target, rel=0.05)
