"""The controller of the sparsity weight, against plants whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trimtab.dictionaries import DictionaryInfo
from trimtab.dictionaries.architectures.gated import GatedConfig, TrainableGated
from trimtab.dictionaries.architectures.panneal import PAnnealConfig, TrainablePAnneal
from trimtab.dictionaries.architectures.standard import ReLUConfig, TrainableReLU
from trimtab.dictionaries.l0_control import LARGEST_MOVE, L0Control
from trimtab.dictionaries.penalised import Penalised


def test_a_fixed_weight_only_warms_up() -> None:
    control = L0Control(2.0, warmup_share=0.2)
    weights = []
    for done in (0.0, 0.1, 0.2, 0.9):
        control.set_progress(done)
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
        control.set_progress(step / steps)
        lr = min(1.0, (steps - step) / (0.3 * steps))
        l0 += (40 / max(control.weight, 0.08) - l0) * lr / 30
        control.update(l0 * (1 + 0.03 * float(torch.randn((), generator=generator))))
    assert l0 == pytest.approx(target, rel=0.05)


def test_the_weight_is_not_raised_while_it_warms_up_but_may_be_lowered() -> None:
    for l0, moves in ((1000.0, False), (1.0, True)):
        control = L0Control(2.0, 10.0, warmup_share=0.5)
        for step in range(40):
            control.set_progress(step / 100)
            control.update(l0)
        assert (control.weight < 2.0 * control.warmup) == moves
        assert control.weight <= 2.0 * control.warmup


def test_a_target_out_of_reach_moves_the_weight_step_by_step_and_stays_finite() -> None:
    control = L0Control(1.0, 10.0)
    before = 1.0
    for step in range(300):
        control.set_progress(step / 300)
        control.update(0.0)
        assert abs(math.log(control.weight / before)) <= LARGEST_MOVE + 1e-9
        before = control.weight
    assert 0 < control.weight < 0.01


def test_without_a_schedule_the_weight_still_answers() -> None:
    """The integral part has no unit of time then; the proportional one needs none."""
    control = L0Control(1.0, 10.0)
    for _ in range(50):
        control.update(20.0)
    assert control.weight > 1.1


def test_rescaling_multiplies_the_weight_and_leaves_the_error_alone() -> None:
    control, rescaled = L0Control(1.0, 10.0), L0Control(1.0, 10.0)
    for step in range(20):
        for c in (control, rescaled):
            c.set_progress(step / 100)
            if step == 10 and c is rescaled:
                c.rescale(3.0)
            c.update(15.0)
    assert rescaled.weight == pytest.approx(3 * control.weight)


def test_the_state_keeps_its_precision_wherever_it_goes() -> None:
    sae = TrainableReLU(ReLUConfig(n_features=8, l0=2.0), 4).to(torch.float16).to("meta")
    assert sae.W_dec.device.type == "meta"
    places = {name: (buffer.dtype, buffer.device.type) for name, buffer in sae.control.named_buffers()}
    assert set(places.values()) == {(torch.float64, "meta")}


def planted_rows(rows: int) -> Tensor:
    """Sums of about 6 of 96 random directions in 24 dimensions, of norm √24 on average."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(96, 24, generator=generator), dim=1)
    codes = torch.rand(rows, 96, generator=generator) * (torch.rand(rows, 96, generator=generator) < 1 / 16)
    x = codes @ directions + 0.02 * torch.randn(rows, 24, generator=generator)
    return x * (24**0.5 / x.norm(dim=1).mean())


@pytest.mark.parametrize("target", [6.0, 24.0])
@pytest.mark.parametrize(
    ("sae_class", "config_class"),
    [(TrainableReLU, ReLUConfig), (TrainablePAnneal, PAnnealConfig), (TrainableGated, GatedConfig)],
)
def test_a_short_training_reaches_the_target_on_other_rows(
    sae_class: type[Penalised], config_class: type, target: float
) -> None:
    steps, batch = 300, 128
    rows, heldout = planted_rows(steps * batch + 4096).split([steps * batch, 4096])
    sae = sae_class(config_class(n_features=96, l0=target), 24)
    sae.initialise(rows[:4096])
    adam = torch.optim.Adam(sae.parameters(), fused=True)
    for step, x in enumerate(rows.split(batch)):
        sae.set_progress(step / steps)
        sae.backward(x)
        sae.project_gradients()
        adam.param_groups[0]["lr"] = 5e-3 * min(1.0, (steps - step) / (0.3 * steps))
        adam.step()
        sae.constrain()
    exported = sae.export(DictionaryInfo(architecture=""))
    codes = exported.encode(heldout)
    within = 0.15 if sae_class is TrainablePAnneal else 0.1  # features that p < 1 has silenced hardly come back
    assert (codes > 0).sum(1).float().mean().item() == pytest.approx(target, rel=within)
    explained = 1 - (heldout - exported.decode(codes)).square().sum() / (heldout - heldout.mean(0)).square().sum()
    assert explained > 0.1
