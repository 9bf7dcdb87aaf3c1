"""Gradients that are written out against those of the same class's `loss`, in float64, sparse and dense."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from training_saes import ROWS, N, batch, build, make_dead, mutate

from trimtab.dictionaries import active, topk_like
from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.architectures.batchtopk import TrainableBatchTopK
from trimtab.dictionaries.architectures.gated import TrainableGated
from trimtab.dictionaries.architectures.jumprelu import TrainableJumpReLU
from trimtab.dictionaries.architectures.matryoshka import TrainableMatryoshka
from trimtab.dictionaries.architectures.panneal import TrainablePAnneal
from trimtab.dictionaries.architectures.standard import TrainableReLU
from trimtab.dictionaries.topk_like import TopKLike
from trimtab.dictionaries.trainable import TrainableSAE

TOPK_LIKE = ("topk", "batchtopk", "matryoshka")
PENALISED: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {}),
    "relu free": ("relu", {"decoder_norm": "free"}),
    "panneal": ("panneal", {}),
    "panneal free": ("panneal", {"decoder_norm": "free"}),
    "gated": ("gated", {}),
    "jumprelu l0": ("jumprelu", {"penalty": "l0", "bandwidth": 1.0}),
    "jumprelu tanh": ("jumprelu", {"penalty": "tanh", "bandwidth": 1.0}),
    "jumprelu l0_target": ("jumprelu", {"penalty": "l0_target", "l0": 4.0, "bandwidth": 1.0}),
}


def check(sae: TrainableSAE) -> None:
    """One step's loss, its terms, the features that fired and every gradient."""
    x = batch()
    expected = TrainableSAE.gradients(sae, x)
    gradients = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    found = sae.gradients(x)
    for term in ("total", "squared_error", "sparsity", "aux"):
        assert float(getattr(found, term)) == pytest.approx(float(getattr(expected, term)), rel=1e-10), term
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-10 * gradients[name].abs().max(), name
    assert found.fired is not None
    assert torch.equal(found.fired, (expected.codes > 0).any(0))
    assert int((found.codes > 0).sum()) == int((expected.codes > 0).sum())
    assert found.codes[found.codes > 0].sum() == pytest.approx(expected.codes.sum())


def check_topk_like(arch: str, *, n_dead: int = 20, lowered: float = 2.0, **settings: Any) -> None:
    sae = build(arch, aux_coefficient=2.0, dead_after=10, **settings)
    sae.b_enc.data -= lowered  # so that some rows have fewer than k positive codes
    make_dead(sae, n_dead)
    check(sae)


def check_penalised(variant: str, *, done: float = 0.25, **settings: Any) -> None:
    arch, own = PENALISED[variant]
    sae = build(arch, **own, **settings, sparsity_warmup_share=0.5)
    sae.set_progress(done)
    if isinstance(sae, TrainablePAnneal):
        sae.linear_below.fill_(0.8)
        sae.before_step(batch())
    check(sae)


def test_every_architecture_is_compared() -> None:
    assert {*TOPK_LIKE, *(arch for arch, _ in PENALISED.values())} == set(TRAINABLE)
    assert all(cls.gradients is not TrainableSAE.gradients for cls in TRAINABLE.values())


@pytest.fixture(params=["sparse", "dense"])
def execution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force one execution of the products, and take the other away."""
    monkeypatch.setattr(TrainableSAE, "execution", request.param)
    for module in (active, topk_like):
        monkeypatch.delattr(module, {"sparse": "DensePairs", "dense": "SparsePairs"}[request.param])


@pytest.mark.usefixtures("execution")
@pytest.mark.parametrize("arch", TOPK_LIKE)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("n_dead", [0, 3, 20])
@pytest.mark.parametrize("lowered", [0.0, 4.0, 8.0])
def test_topk_like_gradients_are_those_of_the_loss(
    arch: str, apply_b_dec_to_input: bool, n_dead: int, lowered: float
) -> None:
    check_topk_like(arch, apply_b_dec_to_input=apply_b_dec_to_input, n_dead=n_dead, lowered=lowered)


@pytest.mark.usefixtures("execution")
@pytest.mark.parametrize("variant", PENALISED)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("done", [0.25, 0.9])
def test_penalised_gradients_are_those_of_the_loss(variant: str, apply_b_dec_to_input: bool, done: float) -> None:
    check_penalised(variant, apply_b_dec_to_input=apply_b_dec_to_input, done=done)


@pytest.mark.usefixtures("execution")
def test_a_group_without_active_features_changes_nothing() -> None:
    sae = build("matryoshka")
    sae.b_enc.data[4:12] = -1e6
    check(sae)


@pytest.mark.parametrize("variant", ["relu", "panneal", "gated"])
def test_a_batch_in_which_nothing_fires_leaves_finite_gradients(variant: str) -> None:
    arch, own = PENALISED[variant]
    sae = build(arch, l0=8.0, **own)
    getattr(sae, sae.vectors[0]).data -= 1e6
    sae.set_progress(0.5)
    assert sae.backward(batch()).l0 == 0
    for name, parameter in sae.named_parameters():
        assert parameter.grad.isfinite().all()
        assert bool(parameter.grad.any()) == (name == "b_dec")
    assert 0 < float(sae.control.weight) < float("inf")


@pytest.mark.parametrize("execution", ["sparse", "dense"])
@pytest.mark.parametrize("arch", TRAINABLE)
def test_a_step_by_automatic_differentiation_leaves_the_same_state(arch: str, execution: str) -> None:
    """Not only gradients: what a step counts, drives and reports is the same either way."""
    fast, plain = (build(arch, **({} if arch in TOPK_LIKE else {"l0": 8.0}), dead_after=50) for _ in range(2))
    plain.by_autograd, fast.execution = True, execution
    for sae, step in itertools.product((fast, plain), range(4)):
        sae.set_progress(0.3 + step / 10)
        loss = sae.backward(batch() * (1 + step))
        told = loss._asdict()
        sae.last = {name: float(value) for name, value in told.items() if name not in ("codes", "fired")}
    assert fast.last == pytest.approx(plain.last, rel=1e-9)
    assert fast.metrics() == pytest.approx(plain.metrics(), rel=1e-9)
    for name, tensor in fast.state_dict().items():
        assert torch.allclose(tensor.double(), plain.state_dict()[name].double(), rtol=1e-9), name
    assert int(fast.tokens_since_fired.max()) in (0, *(ROWS * n for n in range(1, 5)))


def steps_with_dying_features(arch: str, execution: str, steps: int = 24) -> list[torch.Tensor]:
    """All gradients of some steps, as if two more features fell silent at each, and the first three came back."""
    sae = build(arch, aux_coefficient=2.0, dead_after=9 * ROWS)
    sae.execution = execution
    found = []
    for step in range(steps):
        since = torch.arange(N) // 2
        since[:3] = 15 if step >= 15 else 0
        sae.tokens_since_fired.copy_((step - since).clamp_min(0) * ROWS)
        sae.backward(batch() * (1 + step % 3))
        found += [parameter.grad.clone() for parameter in sae.parameters()]
    return found


@pytest.mark.parametrize("execution", ["sparse", "dense"])
@pytest.mark.parametrize("arch", TOPK_LIKE)
def test_features_that_die_between_two_looks_are_dead_at_once(
    arch: str, execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steps_with_dying_features(arch, execution)
    monkeypatch.setattr(topk_like, "LOOK_EVERY", 7)
    monkeypatch.setattr(topk_like, "looks_late", lambda _device: True)
    found = steps_with_dying_features(arch, execution)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("before_step", " - (LOOK_EVERY - 1) * len(x)", ""),
        ("before_step", "self._listed(soon), LOOK_EVERY", "self._listed(soon), 2 * LOOK_EVERY"),
        ("_listed", "soon.int().argmin()", "found[0] if len(found) else 0"),
        ("_add_aux_gradients", "if looked is not None:", "if False:"),
        ("_add_aux_gradients", "keep_largest(h, self._k_aux(len(dead)), folded=False)", "h.clone()"),
    ],
)
def test_mutations_of_looks_are_noticed(method: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = steps_with_dying_features("topk", "sparse")
    monkeypatch.setattr(topk_like, "LOOK_EVERY", 7)
    monkeypatch.setattr(topk_like, "looks_late", lambda _device: True)
    mutate(monkeypatch, TopKLike, method, old, new)
    found = steps_with_dying_features("topk", "sparse")
    with pytest.raises(AssertionError):
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("arch", "execution"), [*((a, "dense") for a in TRAINABLE), ("topk", "sparse")])
def test_a_step_asks_its_device_for_nothing(
    arch: str, execution: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor on the meta device has no values: whatever asks for one fails."""
    monkeypatch.setattr(topk_like, "looks_late", lambda _device: True)
    sae = build(arch, **({} if arch in TOPK_LIKE else {"l0": 8.0}), precision=precision).to("meta")
    sae.execution = execution
    if isinstance(sae, TopKLike):  # which has looked
        sae._may_be_dead, sae._looks_in = torch.empty(5, dtype=torch.long, device="meta"), 2
    sae.set_progress(0.4)
    loss = sae.backward(batch().to("meta"))
    sae.project_gradients()
    sae.constrain()
    assert {loss.total.device.type, loss.l0.device.type, loss.n_dead.device.type} == {"meta"}
    with pytest.raises(RuntimeError, match="meta"):
        float(loss.total)


@pytest.mark.parametrize("arch", TRAINABLE)
def test_dense_products_of_rounded_operands_give_the_same_gradients_to_rounding(arch: str) -> None:
    gradients: dict[str, list[torch.Tensor]] = {}
    for way, settings in {"fp32": {}, "bf16": {"precision": "bf16"}, "autograd": {"precision": "bf16"}}.items():
        sae = build(arch, **({} if arch in TOPK_LIKE else {"l0": 8.0}), **settings)
        sae.execution, sae.by_autograd = "dense", way == "autograd"
        sae = sae.float()
        sae.set_progress(0.4)
        sae.backward(batch().float())
        gradients[way] = [parameter.grad for parameter in sae.parameters()]
    for way in ("bf16", "autograd"):
        for exact, low in zip(gradients["fp32"], gradients[way], strict=True):
            assert low.dtype == torch.float32
            assert 0 < (exact - low).norm() < 0.1 * exact.norm()


def test_features_chosen_in_bfloat16_have_gradients_in_full_precision() -> None:
    sae, exact = build("gated", precision="bf16"), build("gated")
    sae.execution = exact.execution = "sparse"
    sae.b_gate.data -= 0.3
    exact.b_gate.data -= 0.3
    x = batch()
    assert float(sae.backward(x).l0) == pytest.approx(float(exact.backward(x).l0), rel=0.05)
    assert (sae.W_dec.grad - exact.W_dec.grad).abs().max() < 0.02 * exact.W_dec.grad.abs().max()


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_topk_like_codes_chosen_in_bfloat16_are_in_full_precision(arch: str) -> None:
    sae, exact = build(arch, precision="bf16"), build(arch)
    x = batch()
    pairs, expected = (one.active_pairs(one.encoder_input(x)) for one in (sae, exact))
    h = sae.pre_activations(x)
    assert torch.allclose(pairs.value, h[pairs.row, pairs.feature].relu(), atol=1e-12)
    chosen, wanted = (set(zip(p.row.tolist(), p.feature.tolist(), strict=True)) for p in (pairs, expected))
    assert len(chosen & wanted) > 0.95 * len(wanted)
    kept = torch.zeros_like(h).index_put((pairs.row, pairs.feature), torch.ones((), dtype=h.dtype))
    loss = (x - sae.reconstruct(h.relu() * kept)).square().sum(1).mean()
    gradients = torch.autograd.grad(loss, list(sae.parameters()))
    sae.backward(x)
    for parameter, expected_gradient in zip(sae.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, expected_gradient, atol=1e-10)


FILL, TOPK, AUX = (TrainableSAE, "fill_gradients"), (TopKLike, "gradients"), (TopKLike, "_add_aux_gradients")
NESTED, RELU = (TrainableMatryoshka, "reconstruction"), (TrainableReLU, "gradients")
GATED, JUMP = (TrainableGated, "gradients"), (TrainableJumpReLU, "gradients")
MUTATIONS: dict[str, tuple[str, tuple[type, str], str, str]] = {
    "b_dec is not in the encoder's input": ("relu", FILL, "if self.config", "if False and self.config"),
    "silent codes get gradients": ("topk", TOPK, " * (active.h > 0)", ""),
    "b_dec's part comes before aux": ("topk", AUX, "self.b_enc.grad.index_add_(0, dead, grad_f.sum(0))", "pass"),
    "aux without its variance": ("topk", AUX, " / variance)", ")"),
    "batchtopk keeps one too few": ("batchtopk", (TrainableBatchTopK, "active_pairs"), "value >= p", "value > p"),
    "a prefix for itself alone": ("matryoshka", NESTED, "grad += error", "grad = error"),
    "norms without gradient": ("relu free", RELU, "if self.free:\n", "if False:\n"),
    "no penalty on codes": ("relu", RELU, " if self.free else slope)", " if self.free else 0.0)"),
    "a line's slope above c": ("panneal", (TrainablePAnneal, "penalty_slope"), "p * slope", "slope"),
    "the gate's penalty is missing": ("gated", GATED, ".add_(weight)", ""),
    "the magnitude forgets its scale": ("gated", GATED, "by_f.mul_(scale)", "by_f"),
    "thresholds see only what fires": ("jumprelu l0", JUMP, "* near /", "* fires /"),
    "thresholds do not see L0": ("jumprelu l0", JUMP, " + penalty.by_l0 / rows", ""),
    "theta in the unit of codes": ("jumprelu l0", JUMP, " * float(self.row_norm)", ""),
    "tanh does not draw codes": ("jumprelu tanh", JUMP, " + penalty.by_f", ""),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, (owner, method), old, new = MUTATIONS[name]
    mutate(monkeypatch, owner, method, old, new)
    with pytest.raises(AssertionError):
        check_topk_like(case) if case in TOPK_LIKE else check_penalised(case)
