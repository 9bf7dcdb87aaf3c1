"""SAEs with a penalty on codes: their start, p-annealing's schedule and penalty, resumption, what they are saved as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from training_saes import D, N, batch, build

from trimtab.dictionaries import SAE, DictionaryInfo
from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.folding import fold_scale
from trimtab.dictionaries.penalised import ReLULike
from trimtab.errors import UserError

INFO = DictionaryInfo(architecture="")
ARCHITECTURES = ("relu", "panneal", "gated")
VARIANTS = [
    ("gated", {}),
    *((arch, {"decoder_norm": norm}) for arch in ("relu", "panneal") for norm in ("unit", "free")),
]


@pytest.mark.parametrize(("arch", "settings"), VARIANTS)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_the_exported_sae_computes_what_training_computed(
    arch: str, settings: dict[str, str], apply_b_dec_to_input: bool
) -> None:
    sae, x, s = build(arch, **settings, apply_b_dec_to_input=apply_b_dec_to_input), batch(), 3.7
    exported: SAE = sae.export(INFO)
    assert exported.architecture == ("gated" if arch == "gated" else "standard")
    assert exported.info.metadata["training"]["architecture"] == arch
    step = sae.backward(x)
    rebuilt = exported(x)
    assert float((x - rebuilt).square().sum(1).mean()) == pytest.approx(float(step.squared_error))
    assert float((exported.encode(x) > 0).sum(1).double().mean()) == pytest.approx(float(step.l0))
    if settings.get("decoder_norm") == "free":
        assert torch.allclose(exported.decoder_norms, torch.ones(N, dtype=torch.float64))
    folded = fold_scale(exported, s)
    assert torch.allclose(folded(x / s), rebuilt / s, atol=1e-12)
    assert torch.allclose(folded.encode(x / s), exported.encode(x) * (exported.decoder_norms / s), atol=1e-12)
    assert torch.allclose(folded.decoder_norms, torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_only_unit_rows_are_projected_and_renormalised(decoder_norm: str) -> None:
    sae = build("relu", decoder_norm=decoder_norm)
    sae.backward(batch())
    assert sae.W_dec.grad is not None
    weights, grad = sae.W_dec.detach().clone(), sae.W_dec.grad.clone()
    sae.project_gradients()
    sae.constrain()
    assert torch.equal(sae.W_dec.grad, grad) == (decoder_norm == "free")
    assert torch.equal(sae.W_dec, weights) == (decoder_norm == "free")


def fresh(arch: str, **settings: Any) -> ReLULike:
    """One that has not been changed since it was made."""
    cls = TRAINABLE[arch]
    sae = cls(cls.config_class(n_features=20 * D, **settings), D, seed=1, dtype=torch.float64)
    assert isinstance(sae, ReLULike)
    return sae


def train(sae: ReLULike, steps: range, total: int, x: Tensor) -> list[float]:
    """Plain gradient descent; returns losses."""
    losses = []
    for step in steps:
        sae.set_progress(step / total)
        losses.append(float(sae.backward(x.roll(step, 1)).total))
        sae.project_gradients()
        with torch.no_grad():
            for p in sae.parameters():
                p -= 0.003 * p.grad  # pyright: ignore[reportOperatorIssue]
        sae.constrain()
    return losses


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_resumed_training_goes_on_with_the_same_bits(arch: str) -> None:
    x = batch()
    whole = build(arch, l0=8.0)
    whole.initialise(x)
    train(whole, range(25), 60, x)
    resumed = build(arch, l0=8.0)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in whole.state_dict().items()})
    assert train(resumed, range(25, 60), 60, x) == train(whole, range(25, 60), 60, x)
    assert resumed.metrics() == whole.metrics()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_p_falls_in_equal_changes_and_the_penalty_keeps_its_size_at_each() -> None:
    sae = build("panneal", p_end=0.2, p_start_share=0.2, p_steps=4)
    x, p, penalty, weight = batch(), [], [], []
    for step in range(20):
        sae.set_progress(step / 20)
        penalty.append(sae.backward(x).sparsity.item())
        p.append(sae.metrics()["p"])
        weight.append(sae.metrics()["sparsity_weight"])
    assert p == pytest.approx([1.0] * 4 + [0.8] * 4 + [0.6] * 3 + [0.4] * 3 + [0.2] * 6)
    assert penalty[2:] == pytest.approx(penalty[2:3] * 18)  # the parameters stand still and the warm-up is over
    assert weight[2] == pytest.approx(0.7)
    assert weight[-1] != pytest.approx(0.7, rel=0.1)


@pytest.mark.parametrize("p", [1.0, 0.5, 0.2])
def test_the_penalty_is_continuous_and_its_slope_finite_at_zero(p: float) -> None:
    sae = build("panneal")
    sae.p.fill_(p)
    sae.linear_below.fill_(0.01)
    size = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    value, slope = sae.penalty(size), sae.penalty_slope(size)
    assert value[0] == 0
    assert (value.diff() > 0).all()
    assert value[-1] == pytest.approx(1.0)
    assert slope.max() == pytest.approx(0.01 ** (p - 1))
    numeric = (value[2:] - value[:-2]) / 2e-5
    away = (size[1:-1] - 0.01).abs() > 2e-5
    assert torch.allclose(numeric[away], slope[1:-1][away], rtol=1e-4)


def test_the_starting_weight_has_the_unit_of_the_rows() -> None:
    weights = []
    for scale in (1.0, 100.0):
        sae = build("panneal", l0=4.0)
        sae.initialise(batch() * scale)
        sae.set_progress(0.5)
        weights.append((sae.metrics()["sparsity_weight"], float(sae.linear_below)))
    assert weights[1] == pytest.approx([100 * w for w in weights[0]], rel=1e-3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("settings", [{"l0": 4.0}, {"sparsity_weight": 0.7}], ids=["target", "fixed"])
def test_the_first_reconstruction_has_the_best_length(
    arch: str, settings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many unit rows at once overshoot; the encoder is scaled so that no other scale reconstructs the sample better."""

    def best_factor() -> float:
        errors = {}
        for factor in (1.0, 0.97, 1.03):
            sae = fresh(arch, **settings)
            sae.initialise(x)
            for parameter in (sae.W_enc_rows, sae.get_parameter(sae.firing_bias)):
                parameter.data *= factor
            errors[factor] = float(sae.backward(x).squared_error)
        return min(errors, key=errors.__getitem__)

    x = batch(400)
    assert best_factor() == 1.0
    monkeypatch.setattr(ReLULike, "_best_scale", lambda *_: 1.0)  # the mutation
    assert best_factor() != 1.0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_target_is_approached_from_a_little_above_and_every_feature_fires(arch: str) -> None:
    sae = fresh(arch, l0=4.0)
    x = batch(1000)
    sae.initialise(x)
    step = sae.backward(x)
    assert float(step.l0) == pytest.approx(3 * 4.0, rel=0.05)
    assert int((sae.tokens_since_fired > 0).sum()) == 0


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("relu", {"l0": 4.0, "sparsity_weight": 1.0}, "l0 4.0 with sparsity_weight 1.0: a sparsity penalty has either"),
        ("relu", {"l0": None, "sparsity_weight": None}, "l0 None with sparsity_weight None"),
        ("relu", {"l0": 48.0}, "l0 48.0: it must be above 0 and at most n_features − 1 = 47"),
        ("relu", {"l0": 0.0}, "l0 0.0"),
        ("relu", {"sparsity_weight": -1.0}, "sparsity_weight -1.0"),
        ("gated", {"sparsity_weight": float("nan")}, "sparsity_weight nan"),
        ("gated", {"sparsity_warmup_share": 1.0}, "sparsity_warmup_share 1.0: it must be from 0 to below 1"),
        ("relu", {"decoder_norm": "none"}, "decoder_norm 'none': it is one of unit, free"),
        ("panneal", {"p_end": 0.0}, "p_end 0.0"),
        ("panneal", {"p_start_share": 1.5}, "p_start_share 1.5"),
        ("panneal", {"p_steps": 0}, "p_steps 0"),
    ],
)
def test_impossible_settings_are_named(arch: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(arch, **settings)
