"""JumpReLU in training: thresholds, penalties, scaling, resumption, and what it is saved as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import training_saes
from torch import Tensor
from training_saes import ROW_NORM, ROWS, D, N, batch

from trimtab.dictionaries.architectures.jumprelu import JumpReLUConfig, TrainableJumpReLU
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.folding import fold_scale
from trimtab.errors import UserError

L0, EPSILON = 4.0, 0.6
PENALTIES = ["l0_target", "tanh", "l0"]


def build(penalty: str = "l0_target", **settings: Any) -> TrainableJumpReLU:
    """With ε = 0.6 and c = 3 in the unit of its rows."""
    per_unit = D**0.5 / ROW_NORM
    usual = {"bandwidth": EPSILON * per_unit, "tanh_scale": 3.0 / per_unit, "sparsity_warmup_share": 0.0}
    target = {"l0": L0} if penalty == "l0_target" else {"sparsity_weight": 0.7}
    return training_saes.build("jumprelu", penalty=penalty, **{**usual, **target, **settings})


def test_pairs_just_below_their_threshold_reach_it() -> None:
    sae, x = build(), batch()
    with torch.no_grad():
        h = sae.pre_activations(x)
        sae.theta.copy_((h.max(0).values + 0.1) / 2)  # nothing fires; the largest pre-activation is within ε/2
        sae.target_weight.fill_(1e3)
    step = sae.backward(x)
    assert step.l0 == 0
    assert sae.theta.grad is not None
    assert (sae.theta.grad > 0).all()  # lower thresholds bring L0 up to the target
    assert not sae.W_enc_rows.grad.any()  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("minus_bias", [True, False])
def test_exported_sae_gives_the_training_codes_in_model_units(minus_bias: bool) -> None:
    sae, scale, x = build(apply_b_dec_to_input=minus_bias), 0.125, 8 * batch()
    sae.constrain()
    with torch.no_grad():
        sae.b_enc[3] += 5.0
        h = sae.pre_activations(scale * x)
        sae.theta[3] = h[5, 3].abs() / 2  # at z = θ a feature is silent
        f = h * (h > sae.threshold)
        x_hat = f @ sae.W_dec + sae.b_dec
    unfolded = sae.export(DictionaryInfo(architecture="jumprelu", model="m"))
    assert torch.equal(unfolded.encode(scale * x) > 0, f > 0)
    assert unfolded.encode(scale * x)[5, 3] == 0
    exported = fold_scale(unfolded, scale)
    # the boundary itself may round either way once the scale is folded
    apart = (h - sae.threshold).abs() > 1e-8
    assert torch.allclose(exported.encode(x)[apart], f[apart] / scale, atol=1e-10)
    assert torch.allclose(exported.decode(f / scale), x_hat / scale, atol=1e-10)
    assert torch.allclose(exported.threshold[4:], sae.threshold[4:] / scale, rtol=1e-12)
    assert (exported.info.architecture, exported.info.model) == ("jumprelu", "m")
    assert exported.info.metadata["training"]["penalty"] == "l0_target"


def test_every_feature_starts_by_firing_on_its_share_of_the_sample() -> None:
    sae, x = build(), batch(600)
    sae.initialise(x)
    fires = sae.pre_activations(x) > sae.threshold * (1 + 1e-12)
    assert torch.equal(fires.sum(0), torch.full((N,), round(L0 / N * 600)))
    assert fires.sum(1).double().mean().item() == pytest.approx(L0, rel=0.05)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_scaling_the_rows_scales_the_first_step_and_nothing_else(penalty: str) -> None:
    steps = []
    for unit in (1.0, 0.125):
        sae = build(penalty, theta_init=0.8, l0=L0, sparsity_weight=None, bandwidth=None)
        sae.b_enc.data.zero_()
        sae.initialise(unit * batch(400))
        step = sae.backward(unit * batch())
        steps.append((step.total / unit**2, step.sparsity / unit**2, step.l0, sae.theta.grad / unit**2))  # pyright: ignore
    for a, b in zip(*steps, strict=True):
        assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6)


def test_the_driven_weight_starts_at_what_a_feature_is_worth() -> None:
    sae = build("l0", l0=L0, sparsity_weight=None)
    x = batch(400)
    sae.initialise(x)
    assert sae.metrics()["sparsity_weight"] == pytest.approx(0.3 * sae.threshold.square().mean().item())
    before = sae.metrics()["sparsity_weight"]
    sae.backward(x[:ROWS])
    sae.control.set_progress(0.5)
    assert sae.metrics()["sparsity_weight"] != before


def train(sae: TrainableJumpReLU, x: Tensor, steps: range, total: int, adam: torch.optim.Adam) -> float:
    l0 = 0.0
    for i in steps:
        sae.set_progress(i / total)
        l0 = sae.backward(x[(64 * i) % len(x) :][:64]).l0
        sae.project_gradients()
        adam.step()
        sae.constrain()
    return l0


@pytest.mark.parametrize("penalty", PENALTIES)
def test_state_dict_resumes_exactly(penalty: str) -> None:
    x = batch(640)
    target = {"l0": L0, "sparsity_weight": None, "sparsity_warmup_share": 0.1}
    whole, first, second = (build(penalty, **target) for _ in range(3))
    optimisers = [torch.optim.Adam(s.parameters(), lr=3e-3) for s in (whole, first, second)]
    for s in (whole, first):
        s.initialise(x)
    train(whole, x, range(12), 12, optimisers[0])
    train(first, x, range(7), 12, optimisers[1])
    second.load_state_dict(first.state_dict())
    optimisers[2].load_state_dict(optimisers[1].state_dict())
    train(second, x, range(7, 12), 12, optimisers[2])
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_l0_reaches_the_target_on_rows_not_trained_on() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(3000, N, generator=generator) * (torch.rand(3000, N, generator=generator) < L0 / N)
    directions = torch.nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1)
    x = (codes @ directions).double()
    x *= D**0.5 / x.norm(dim=1).mean()
    sae = build(bandwidth=None)
    sae.initialise(x[:2000])
    train(sae, x[:2000], range(200), 200, torch.optim.Adam(sae.parameters(), lr=3e-3))
    held_out = sae.export(DictionaryInfo(architecture="jumprelu")).encode(x[2000:])
    assert (held_out > 0).sum(1).double().mean().item() == pytest.approx(L0, rel=0.1)


def test_thresholds_stay_at_least_zero() -> None:
    sae = build()
    sae.theta.data[:5] = -0.5
    sae.constrain()
    assert sae.threshold.min() == 0
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(N, dtype=torch.float64))


def test_thresholds_have_at_least_single_precision() -> None:
    config = JumpReLUConfig(n_features=N, l0=L0)
    assert TrainableJumpReLU(config, D, dtype=torch.bfloat16).theta.dtype == torch.float32
    assert TrainableJumpReLU(config, D, dtype=torch.float64).theta.dtype == torch.float64


def test_a_fixed_weight_alone_is_one_of_the_l0_penalty() -> None:
    assert JumpReLUConfig(n_features=N, sparsity_weight=1.0).kind == "l0"
    assert JumpReLUConfig(n_features=N, l0=3).kind == "l0_target"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l0": 3, "penalty": "l1"}, "penalty 'l1': it is one of l0_target, tanh, l0"),
        ({"sparsity_weight": 1.0, "penalty": "l0_target"}, "l0 None: the penalty l0_target needs a target"),
        ({"l0": 3, "bandwidth": 0.0}, "bandwidth 0.0: it must be positive and finite"),
        ({"l0": 3, "tanh_scale": -1.0}, "tanh_scale -1.0: it must be positive and finite"),
        ({"l0": 3, "theta_init": -0.1}, "theta_init -0.1: it must be at least 0 and finite"),
        ({"l0": N}, f"l0 {N}: it must be above 0 and at most n_features − 1 = {N - 1}"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        JumpReLUConfig(n_features=N, **settings)  # pyright: ignore[reportArgumentType]
