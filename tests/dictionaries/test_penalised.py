"""SAEs with a sparsity penalty: gradients against automatic differentiation of the dense loss, in float64; export."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.dictionaries import DictionaryInfo, active
from trimtab.dictionaries.architectures.gated import GatedConfig, TrainableGated
from trimtab.dictionaries.architectures.panneal import PAnnealConfig, TrainablePAnneal
from trimtab.dictionaries.architectures.standard import ReLUConfig, TrainableReLU
from trimtab.dictionaries.folding import fold_scale
from trimtab.dictionaries.penalised import Penalised
from trimtab.dictionaries.relu_like import ReLULike
from trimtab.dictionaries.sae import SAE
from trimtab.errors import UserError

D, N, ROWS = 10, 48, 37
INFO = DictionaryInfo(architecture="")
CLASSES: dict[str, tuple[type[ReLULike], type]] = {
    "relu": (TrainableReLU, ReLUConfig),
    "panneal": (TrainablePAnneal, PAnnealConfig),
    "gated": (TrainableGated, GatedConfig),
}
VARIANTS = [
    ("relu", {"decoder_norm": "unit"}),
    ("relu", {"decoder_norm": "free"}),
    ("panneal", {"decoder_norm": "unit"}),
    ("panneal", {"decoder_norm": "free"}),
    ("gated", {}),
]


@pytest.fixture(params=["sparse", "dense"])
def execution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one execution of the step, and check that it is the one that ran."""
    monkeypatch.setattr(Penalised, "dense_above", 1.0 if request.param == "sparse" else -1.0)
    unwanted = {"sparse": "DensePairs", "dense": "SparsePairs"}[request.param]
    monkeypatch.delattr(active, unwanted)
    return request.param


def build(arch: str, **settings: Any) -> ReLULike:
    sae_class, config_class = CLASSES[arch]
    if "l0" not in settings:
        settings.setdefault("sparsity_weight", 0.7)
    sae = sae_class(config_class(n_features=N, block_rows=16, **settings), D, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in sae.parameters():  # away from W_enc = W_decᵀ, unit rows and zero biases, where errors could cancel
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return sae


def batch(rows: int = ROWS) -> Tensor:
    return 2 * torch.randn(rows, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5


def dense_loss(sae: Penalised, x: Tensor, weight: float) -> dict[str, Tensor]:
    """The terms of the loss from their definitions, all features dense, for automatic differentiation."""
    z = x - sae.b_dec if sae.config.apply_b_dec_to_input else x
    if isinstance(sae, TrainableGated):
        p = z @ sae.W_enc_rows.T
        gate = (p + sae.b_gate).relu()
        f = (p + sae.b_gate > 0) * (p * sae.r_mag.exp() + sae.b_mag).relu()
        via_gate = gate @ sae.W_dec.detach() + sae.b_dec.detach()
        aux = (x - via_gate).square().sum(1).mean()
        penalty = gate.sum(1).mean()
    else:
        f = (z @ sae.W_enc_rows.T + sae.b_enc).relu()
        size = f * sae.W_dec.norm(dim=1) if getattr(sae.config, "decoder_norm", "unit") == "free" else f
        if isinstance(sae, TrainablePAnneal):
            c, p = float(sae.linear_below), float(sae.p)
            size = torch.where(size > c, size.clamp_min(c) ** p, size / c * c**p)
        penalty, aux = size.sum(1).mean(), torch.zeros(())
    error = (x - f @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    return {"squared_error": error, "sparsity": weight * penalty, "aux": aux, "l0": (f > 0).sum(1).double().mean()}


def relative_error(ours: Tensor | None, reference: Tensor) -> float:
    assert ours is not None
    return float((ours - reference).abs().max() / reference.abs().max())


@pytest.mark.usefixtures("execution")
@pytest.mark.parametrize(("arch", "settings"), VARIANTS)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("done", [0.25, 0.9])
def test_gradients_equal_the_dense_reference(
    arch: str, settings: dict[str, str], apply_b_dec_to_input: bool, done: float
) -> None:
    sae = build(arch, **settings, apply_b_dec_to_input=apply_b_dec_to_input, sparsity_warmup_share=0.5)
    if isinstance(sae, TrainablePAnneal):
        sae.linear_below.fill_(0.8)
    x = batch()
    sae.set_progress(done)
    step = sae.backward(x)
    weight = sae.metrics()["sparsity_weight"]
    if arch != "panneal":
        assert weight == pytest.approx(0.7 * min(1, done / 0.5))
    terms = dense_loss(sae, x, weight)
    loss = terms["squared_error"] + terms["sparsity"] + terms["aux"]
    for name in ("squared_error", "sparsity", "aux"):
        assert float(getattr(step, name)) == pytest.approx(terms[name].item(), rel=1e-12), name
    assert float(step.loss) == pytest.approx(loss.item(), rel=1e-12)
    assert step.l0 == pytest.approx(float(terms["l0"]))
    for (name, parameter), reference in zip(
        sae.named_parameters(), torch.autograd.grad(loss, list(sae.parameters())), strict=True
    ):
        assert relative_error(parameter.grad, reference) < 1e-10, name


@pytest.mark.parametrize("arch", list(CLASSES))
def test_a_batch_in_which_nothing_fires_leaves_finite_gradients(arch: str) -> None:
    sae = build(arch, l0=8.0)
    getattr(sae, sae.vectors[0]).data -= 1e6
    sae.set_progress(0.5)
    step = sae.backward(batch())
    assert step.l0 == 0
    for name, p in sae.named_parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert bool(p.grad.any()) == (name == "b_dec")
    assert math.isfinite(sae.metrics()["sparsity_weight"])


@pytest.mark.usefixtures("execution")
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_the_gates_reconstruction_reaches_the_gate_and_never_the_decoder(apply_b_dec_to_input: bool) -> None:
    """The step's gradient minus that of the plain reconstruction is what gate penalty and reconstruction add."""
    sae = build("gated", apply_b_dec_to_input=apply_b_dec_to_input, sparsity_weight=0.0)
    x = batch()
    sae.backward(x)
    terms = dense_loss(sae, x, 0.0)
    plain = torch.autograd.grad(terms["squared_error"], list(sae.parameters()), allow_unused=True)
    added = {
        name: float((p.grad - (0 if g is None else g)).abs().max())  # pyright: ignore[reportOptionalOperand]
        for (name, p), g in zip(sae.named_parameters(), plain, strict=True)
    }
    reached = {name for name, size in added.items() if size > 1e-9}
    assert reached == {"W_enc_rows", "b_gate"} | ({"b_dec"} if apply_b_dec_to_input else set())


def test_nothing_but_gate_terms_moves_the_gates_bias() -> None:
    """The gate's step has no derivative: without penalty and auxiliary loss its bias would stay."""
    sae = build("gated", sparsity_weight=0.0)
    terms = dense_loss(sae, batch(), 0.0)
    (by_bias,) = torch.autograd.grad(terms["squared_error"], [sae.b_gate], allow_unused=True, materialize_grads=True)
    assert not by_bias.any()


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
    assert float((exported.encode(x) > 0).sum(1).double().mean()) == pytest.approx(step.l0)
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


def train(sae: Penalised, steps: range, total: int, x: Tensor) -> list[float]:
    """Plain gradient descent; returns losses."""
    losses = []
    for step in steps:
        sae.set_progress(step / total)
        losses.append(float(sae.backward(x.roll(step, 1)).loss))
        sae.project_gradients()
        with torch.no_grad():
            for p in sae.parameters():
                p -= 0.003 * p.grad  # pyright: ignore[reportOperatorIssue]
        sae.constrain()
    return losses


@pytest.mark.parametrize("arch", list(CLASSES))
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
    assert isinstance(sae, TrainablePAnneal)
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
        assert isinstance(sae, TrainablePAnneal)
        weights.append((sae.metrics()["sparsity_weight"], float(sae.linear_below)))
    assert weights[1] == pytest.approx([100 * w for w in weights[0]], rel=1e-3)


@pytest.mark.parametrize("arch", list(CLASSES))
@pytest.mark.parametrize("settings", [{"l0": 4.0}, {"sparsity_weight": 0.7}], ids=["target", "fixed"])
def test_the_first_reconstruction_has_the_best_length(
    arch: str, settings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many unit rows at once overshoot; the encoder is scaled so that no other scale reconstructs the sample better."""
    sae_class, config_class = CLASSES[arch]

    def best_factor() -> float:
        errors = {}
        for factor in (1.0, 0.97, 1.03):
            sae = sae_class(config_class(n_features=20 * D, **settings), D, seed=1, dtype=torch.float64)
            sae.initialise(x)
            for parameter in (sae.W_enc_rows, sae.get_parameter(sae.firing_bias)):
                parameter.data *= factor
            errors[factor] = float(sae.backward(x).squared_error)
        return min(errors, key=errors.__getitem__)

    x = batch(400)
    assert best_factor() == 1.0
    monkeypatch.setattr(ReLULike, "_best_scale", lambda *_: 1.0)  # the mutation
    assert best_factor() != 1.0


@pytest.mark.parametrize("arch", list(CLASSES))
def test_a_target_is_approached_from_a_little_above_and_every_feature_fires(arch: str) -> None:
    sae_class, config_class = CLASSES[arch]
    sae = sae_class(config_class(n_features=20 * D, l0=4.0), D, seed=1, dtype=torch.float64)
    x = batch(1000)
    sae.initialise(x)
    step = sae.backward(x)
    assert step.l0 == pytest.approx(3 * 4.0, rel=0.05)
    assert int((sae.tokens_since_fired > 0).sum()) == 0


def test_features_chosen_in_bfloat16_have_gradients_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Penalised, "dense_above", 1.0)
    sae, exact = build("gated", encoder_dtype="bfloat16"), build("gated")
    sae.b_gate.data -= 0.3
    exact.b_gate.data -= 0.3
    x = batch()
    assert sae.backward(x).l0 == pytest.approx(exact.backward(x).l0, rel=0.05)
    assert relative_error(sae.W_dec.grad, exact.W_dec.grad) < 0.02  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("relu", {"l0": 4.0, "sparsity_weight": 1.0}, "l0 4.0 with sparsity_weight 1.0: a sparsity penalty has either"),
        ("relu", {"l0": None, "sparsity_weight": None}, "l0 None with sparsity_weight None"),
        ("relu", {"l0": 48.0}, "l0 48.0: it must be above 0 and at most n_features − 1 = 47"),
        ("relu", {"l0": 0.0}, "l0 0.0"),
        ("relu", {"sparsity_weight": -1.0}, "sparsity_weight -1.0"),
        ("gated", {"sparsity_weight": float("nan")}, "sparsity_weight nan"),
        ("gated", {"sparsity_warmup_share": 1.0}, "sparsity_warmup_share 1.0: a share is from 0 to below 1"),
        ("relu", {"decoder_norm": "none"}, "decoder_norm 'none': it is one of unit, free"),
        ("panneal", {"p_end": 0.0}, "p_end 0.0"),
        ("panneal", {"p_start_share": 1.5}, "p_start_share 1.5"),
        ("panneal", {"p_steps": 0}, "p_steps 0"),
    ],
)
def test_impossible_settings_are_named(arch: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(arch, **settings)
