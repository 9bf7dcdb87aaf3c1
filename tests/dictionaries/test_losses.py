"""The loss of every architecture against numbers worked out by hand from its paper's formula.

Three features in two dimensions. With b_dec = (1, 0) the encoder sees the rows (3, 2) and (1, −2) as (2, 2) and
(0, −2); W_encᵀ = W_dec = [(1, 0), (0, 1), (0.6, 0.8)] and b_enc = (0.5, 0, −1) give the pre-activations

    h = [[2.5, 2, 1.8], [0.5, −2, −2.6]].

The gradients follow from the loss by automatic differentiation, except where a paper says otherwise: what it lets
count as data, and JumpReLU's estimators. Those are checked here too. `test_mutations_are_noticed` breaks each formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from training_saes import mutate

from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.architectures.batchtopk import TrainableBatchTopK
from trimtab.dictionaries.architectures.jumprelu import TrainableJumpReLU
from trimtab.dictionaries.architectures.panneal import TrainablePAnneal
from trimtab.dictionaries.architectures.standard import TrainableReLU
from trimtab.dictionaries.topk_like import TopKLike
from trimtab.dictionaries.trainable import Loss, TrainableSAE

X = torch.tensor([[3.0, 2.0], [1.0, -2.0]], dtype=torch.float64)
ROWS_OF_W = [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]


def build(arch: str, *, dead: tuple[int, ...] = (), **settings: Any) -> Any:
    cls = TRAINABLE[arch]
    sae = cls(cls.config_class(n_features=3, dead_after=10, **settings), 2, dtype=torch.float64)
    put(sae, W_enc_rows=ROWS_OF_W, W_dec=ROWS_OF_W, b_dec=[1.0, 0.0])
    if "b_enc" in sae.vectors:
        put(sae, b_enc=[0.5, 0.0, -1.0])
    sae.tokens_since_fired[list(dead)] = 11
    return sae


def put(sae: TrainableSAE, **values: Any) -> None:
    with torch.no_grad():
        for name, value in values.items():
            getattr(sae, name).copy_(torch.tensor(value, dtype=torch.float64))


def check(loss: Loss, codes: list[list[float]], **terms: float) -> None:
    """Codes and terms as they should be; the total is the sum of squared error and sparsity unless it is given."""
    found = {
        name: torch.as_tensor(getattr(loss, name)).item() for name in ("total", "squared_error", "sparsity", "aux")
    }
    expected = {"sparsity": 0.0, "aux": 0.0, **terms}
    expected.setdefault("total", expected["squared_error"] + expected["sparsity"])
    assert found == pytest.approx(expected, rel=1e-12)
    assert loss.codes.flatten().tolist() == pytest.approx([code for row in codes for code in row], rel=1e-12)


def gradient(value: Tensor, *parameters: Tensor) -> list[Tensor]:
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(value, parameters, **options))


def check_topk() -> None:
    # k = 1: x̂ = (3.5, 0) and (1.5, 0); errors (−0.5, 2) and (−0.5, −2)
    check(build("topk", k=1).loss(X), [[2.5, 0, 0], [0.5, 0, 0]], squared_error=4.25)
    # k = 2: x̂ = (3.5, 2); the second row's other entry is negative, so that it stays as it was
    check(build("topk", k=2).loss(X), [[2.5, 2, 0], [0.5, 0, 0]], squared_error=(0.25 + 4.25) / 2)
    # the encoder sees (3, 2) and (1, −2): h = [[3.5, 2, 2.4], [1.5, −2, −2]]; x̂ = (4.5, 0), (2.5, 0)
    plain = build("topk", k=1, apply_b_dec_to_input=False)
    check(plain.loss(X), [[3.5, 0, 0], [1.5, 0, 0]], squared_error=(2.25 + 4 + 2.25 + 4) / 2)


def check_aux() -> None:
    # ê = 1.8·(0.6, 0.8) and 0; ‖e − ê‖² = 1.58² + 0.56² and 4.25; the residual's variance is 2² + 2²
    aux = (1.58**2 + 0.56**2 + 4.25) / 8
    sae = build("topk", k=1, dead=(2,), aux_coefficient=2.0, k_aux=1)
    loss = sae.loss(X)
    check(loss, [[2.5, 0, 0], [0.5, 0, 0]], squared_error=4.25, aux=aux, total=4.25 + 2 * aux)
    # the residual counts as data: of the decoder only the dead row learns, b_dec only as far as the encoder sees it
    W_dec, b_enc, b_dec = gradient(loss.aux, sae.W_dec, sae.b_enc, sae.b_dec)  # pyright: ignore[reportArgumentType]
    by_f = -2 * (-1.58 * 0.6 + 0.56 * 0.8) / 8  # by the dead feature's code in the first row
    assert W_dec.tolist() == [[0, 0], [0, 0], pytest.approx([1.8 * 2 * 1.58 / 8, -1.8 * 2 * 0.56 / 8])]
    assert b_enc.tolist() == [0, 0, pytest.approx(by_f)]
    assert b_dec.tolist() == pytest.approx([-0.6 * by_f, -0.8 * by_f])
    # k_aux = 1 of two dead features: the larger one in each row; in the second it is negative
    two = build("topk", k=1, dead=(1, 2), k_aux=1).loss(X)
    assert two.aux.item() == pytest.approx((0.5**2 + 0 + 4.25) / 8)  # ê = (0, 2)


def check_batchtopk() -> None:
    # k·B = 2 codes of both rows together: 2.5 and 2, both in the first; x̂ = (3.5, 2) and (1, 0)
    check(build("batchtopk", k=1).loss(X), [[2.5, 2, 0], [0, 0, 0]], squared_error=(0.25 + 4) / 2)
    # k·B = 4: all that are positive; x̂ = (4.58, 3.44) and (1.5, 0)
    all_of_them = build("batchtopk", k=2).loss(X)
    check(all_of_them, [[2.5, 2, 1.8], [0.5, 0, 0]], squared_error=(1.58**2 + 1.44**2 + 4.25) / 2)
    # residuals (−0.5, 0) and (0, −2), of variance 2·0.25² + 2·1²; ê = 1.8·(0.6, 0.8) and 0
    aux = ((0.5 + 1.08) ** 2 + 1.44**2 + 4) / (2 * 0.25**2 + 2)
    total = (0.25 + 4) / 2 + aux / 32
    check(
        build("batchtopk", k=1, dead=(2,)).loss(X), [[2.5, 2, 0], [0, 0, 0]], squared_error=2.125, aux=aux, total=total
    )


def check_matryoshka() -> None:
    # BatchTopK's codes; the first feature alone gives x̂ = (3.5, 0) and (1, 0), all of them (3.5, 2) and (1, 0)
    first, whole = (0.25 + 4 + 4) / 2, (0.25 + 4) / 2
    sae = build("matryoshka", k=1, groups=(1 / 3, 2 / 3))
    check(sae.loss(X), [[2.5, 2, 0], [0, 0, 0]], squared_error=whole, total=first + whole)
    # k·B = 4: the first group holds 2.5 and 0.5, the second the others
    first, whole = 4.25, (1.58**2 + 1.44**2 + 4.25) / 2
    sae = build("matryoshka", k=2, groups=(1 / 3, 2 / 3))
    check(sae.loss(X), [[2.5, 2, 1.8], [0.5, 0, 0]], squared_error=whole, total=first + whole)
    # AuxK is on the residual of the last prefix, as for BatchTopK
    aux = ((0.5 + 1.08) ** 2 + 1.44**2 + 4) / (2 * 0.25**2 + 2)
    with_dead = build("matryoshka", k=1, groups=(1 / 3, 2 / 3), dead=(2,)).loss(X)
    assert with_dead.total.item() == pytest.approx((0.25 + 4 + 4) / 2 + (0.25 + 4) / 2 + aux / 32)


def check_relu() -> None:
    # x̂ = (2.5 + 1.08 + 1, 2 + 1.44) and (1.5, 0); Σ f = 6.3 and 0.5
    codes = [[2.5, 2, 1.8], [0.5, 0, 0]]
    squared_error = (1.58**2 + 1.44**2 + 4.25) / 2
    sae = build("relu", sparsity_weight=0.1)
    check(sae.loss(X), codes, squared_error=squared_error, sparsity=0.1 * (6.3 + 0.5) / 2)
    # a third row of norm 2: x̂ = (5.66, 4.88), Σ f·‖W_dec‖ = 2.5 + 2 + 3.6
    free = build("relu", sparsity_weight=0.1, decoder_norm="free")
    put(free, W_dec=[*ROWS_OF_W[:2], [1.2, 1.6]])
    squared_error = (2.66**2 + 2.88**2 + 4.25) / 2
    check(free.loss(X), codes, squared_error=squared_error, sparsity=0.1 * (8.1 + 0.5) / 2)


def check_panneal() -> None:
    # Σ √f, but f·c^(−1/2) below c = 1
    sae = build("panneal", sparsity_weight=0.1)
    sae.p.fill_(0.5)
    sae.linear_below.fill_(1.0)
    sparsity = 0.1 * (math.sqrt(2.5) + math.sqrt(2) + math.sqrt(1.8) + 0.5) / 2
    squared_error = (1.58**2 + 1.44**2 + 4.25) / 2
    check(sae.loss(X), [[2.5, 2, 1.8], [0.5, 0, 0]], squared_error=squared_error, sparsity=sparsity)
    sae.linear_below.fill_(0.16)  # √0.5 now; and f·0.16^(−1/2) for a code of 0.1
    put(sae, b_enc=[0.1, -9.0, -9.0])
    assert sae.loss(X).sparsity.item() == pytest.approx(0.1 * (math.sqrt(2.1) + 0.1 / 0.4) / 2)


def check_gated() -> None:
    # p = [[2, 2, 2.8], [0, −2, −1.6]], π = p + (0.5, 0, −3) = [[2.5, 2, −0.2], [0.5, −2, −4.6]], magnitudes
    # p·(2, 1, 1) + (−1, 1, 5) = [[3, 3, 7.8], [−1, −1, 3.4]]: one gate is shut on a large one, one open on a negative
    sae = build("gated", sparsity_weight=0.1)
    put(sae, b_gate=[0.5, 0.0, -3.0], r_mag=[math.log(2), 0.0, 0.0], b_mag=[-1.0, 1.0, 5.0])
    loss = sae.loss(X)
    # x̂ = (4, 3) and (1, 0); Σ ReLU(π) = 4.5 and 0.5; by way of the gate x̂ = (3.5, 2) and (1.5, 0)
    squared_error, sparsity, aux = (2 + 4) / 2, 0.1 * (4.5 + 0.5) / 2, (0.25 + 4.25) / 2
    total = squared_error + sparsity + aux
    check(loss, [[3, 3, 0], [0, 0, 0]], squared_error=squared_error, sparsity=sparsity, aux=aux, total=total)
    # the auxiliary loss decodes with copies; the squared error does not reach the gate
    assert not any(g.any() for g in gradient(loss.aux, sae.W_dec, sae.b_mag, sae.r_mag))  # pyright: ignore
    # −2/B·(x − x̂)·W_dec is 0.5 in both rows, for the first feature; b_dec gets it through the encoder's input alone
    b_gate, b_dec = gradient(loss.aux, sae.b_gate, sae.b_dec)  # pyright: ignore[reportArgumentType]
    assert b_gate.tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert b_dec.tolist() == pytest.approx([-1.0, 0.0])
    assert not gradient(loss.squared_error, sae.b_gate)[0].any()


def check_jumprelu() -> None:
    # θ = (1, 2, 1.9): at z = θ a feature is silent; x̂ = (3.5, 0) and (1, 0); L0 = 1/2
    codes, squared_error = [[2.5, 0, 0], [0, 0, 0]], (4.25 + 4) / 2
    unit = 1 / math.sqrt(2)  # of rows whose mean norm is 1
    for penalty, settings, sparsity in (
        ("l0", {"sparsity_weight": 0.1}, 0.1 / 2),
        ("l0_target", {"l0": 2.0}, 3 * (0.5 / 2 - 1) ** 2),
        ("tanh", {"sparsity_weight": 0.1, "tanh_scale": 0.8 * unit}, 0.1 * math.tanh(2) / 2),
    ):
        sae = build("jumprelu", penalty=penalty, bandwidth=0.5 / unit, **settings)
        sae.row_norm.fill_(1.0)
        sae.target_weight.fill_(3.0)
        put(sae, theta=[1.0, 2.0, 1.9])
        loss = sae.loss(X)
        check(loss, codes, squared_error=squared_error, sparsity=sparsity)
        # ε = 0.5: of the first row, features 1 and 2 are within ε/2 of θ. With ∂‖x − x̂‖²/∂f = −(−0.5, 2)·W:
        by_f = [0.5, -2.0, -1.3]
        b_enc, theta = gradient(loss.squared_error, sae.b_enc, sae.theta)
        assert b_enc.tolist() == pytest.approx([by_f[0], 0, 0])
        assert theta.tolist() == pytest.approx([0, by_f[1] * -2 / 0.5, by_f[2] * -1.9 / 0.5])
        b_enc, theta = gradient(loss.sparsity, sae.b_enc, sae.theta)  # pyright: ignore[reportArgumentType]
        by_l0 = {"l0": 0.1, "l0_target": 2 * 3 * (0.5 / 2 - 1) / 2, "tanh": 0.0}[penalty]
        slope = [0.1 / 2 * 0.8 * (1 - math.tanh(0.8 * f) ** 2) if penalty == "tanh" else 0.0 for f in (2.5, 0.0, 0.0)]
        assert b_enc.tolist() == pytest.approx([slope[0], 0, 0])
        near = [slope[i] * -t / 0.5 - by_l0 / 2 / 0.5 for i, t in ((1, 2.0), (2, 1.9))]
        assert theta.tolist() == pytest.approx([0, *near])


CHECKS: dict[str, Callable[[], None]] = {
    "topk": check_topk,
    "aux": check_aux,
    "batchtopk": check_batchtopk,
    "matryoshka": check_matryoshka,
    "relu": check_relu,
    "panneal": check_panneal,
    "gated": check_gated,
    "jumprelu": check_jumprelu,
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_loss_is_the_papers(name: str) -> None:
    CHECKS[name]()


def test_every_architecture_is_checked() -> None:
    assert set(TRAINABLE) <= set(CHECKS)


JUMP, GATED, TOPK, BATCH, NESTED = (
    (TRAINABLE[arch], "loss") for arch in ("jumprelu", "gated", "topk", "batchtopk", "matryoshka")
)
AUX, KEPT, RELU = (TopKLike, "aux_loss"), (TrainableBatchTopK, "kept"), (TrainableReLU, "loss")
DECODE, INPUT = (TrainableSAE, "reconstruct"), (TrainableSAE, "encoder_input")
P_PENALTY, J_PENALTY = (TrainablePAnneal, "penalty"), (TrainableJumpReLU, "penalty")
MUTATIONS: dict[str, tuple[str, tuple[type, str], str, str]] = {
    "topk: one more is kept": ("topk", TOPK, "h.topk(self.k", "h.topk(self.k + 1"),
    "topk: negative codes pass": ("topk", TOPK, "h.relu() * kept", "h * kept"),
    "topk: rows are summed": ("topk", TOPK, ".sum(1).mean()", ".sum()"),
    "topk: the width is averaged": ("topk", TOPK, ".sum(1).mean()", ".mean()"),
    "topk: no bias when decoding": ("topk", DECODE, " + self.b_dec", ""),
    "topk: b_dec always comes off": ("topk", INPUT, "if self.config", "if True or self.config"),
    "aux: no coefficient": ("aux", TOPK, "self.config.aux_coefficient * ", ""),
    "aux: the residual learns": ("aux", AUX, "error.detach()", "error"),
    "aux: not normalised": ("aux", AUX, " / _variance(e)", ""),
    "aux: all dead features": ("aux", AUX, "self._k_aux(h.shape[1])", "h.shape[1]"),
    "aux: negative codes pass": ("aux", AUX, "h.relu() * kept", "h * kept"),
    "aux: decoded with b_dec": ("aux", AUX, "self.W_dec[dead]", "self.W_dec[dead] + self.b_dec"),
    "batchtopk: k for all rows": ("batchtopk", KEPT, "self.k * len(h)", "self.k"),
    "batchtopk: the smallest falls out": ("batchtopk", KEPT, "h >= h", "h > h"),
    "batchtopk: no aux": ("batchtopk", BATCH, "self.config.aux_coefficient", "0.0"),
    "matryoshka: only the whole counts": ("matryoshka", NESTED, "squared.sum()", "squared[-1]"),
    "matryoshka: groups are not nested": ("matryoshka", NESTED, "itertools.accumulate(", "iter("),
    "matryoshka: aux of the first prefix": ("matryoshka", NESTED, "(h, errors[-1])", "(h, errors[0])"),
    "relu: norms do not count": ("relu", RELU, "f * self.W_dec.norm(dim=1)", "f"),
    "relu: no weight": ("relu", RELU, "self.control.weight * ", ""),
    "panneal: L1": ("panneal", P_PENALTY, "float(self.p) - 1", "0.0"),
    "panneal: no line below c": ("panneal", P_PENALTY, ".clamp_min(float(self.linear_below))", ""),
    "gated: every gate is open": ("gated", GATED, "(gate > 0) * ", ""),
    "gated: the gate scales": ("gated", GATED, "(gate > 0) * ", "gate * "),
    "gated: r_mag is no logarithm": ("gated", GATED, "self.r_mag.exp() * ", "(1 + self.r_mag) * "),
    "gated: the decoder is not frozen": ("gated", GATED, "self.W_dec.detach()", "self.W_dec"),
    "gated: the bias is not frozen": ("gated", GATED, "self.b_dec.detach()", "self.b_dec"),
    "gated: the penalty is on codes": ("gated", GATED, "gate.sum(1)", "f.sum(1)"),
    "jumprelu: fires at its threshold": ("jumprelu", JUMP, "(h > theta)", "(h >= theta)"),
    "jumprelu: codes start at 0": ("jumprelu", JUMP, "f = h * (h > theta)", "f = (h - theta).relu()"),
    "jumprelu: no estimator of f": ("jumprelu", JUMP, " + theta.detach() * kernel * through", ""),
    "jumprelu: the estimator of h·H": ("jumprelu", JUMP, "theta.detach() * kernel", "h.detach() * kernel"),
    "jumprelu: no estimator of H": ("jumprelu", JUMP, "(h > theta) + kernel * through", "(h > theta) + 0 * through"),
    "jumprelu: too wide a kernel": ("jumprelu", JUMP, "self.bandwidth / 2)", "4 * self.bandwidth)"),
    "jumprelu: no target": ("jumprelu", J_PENALTY, " / self.config.l0 - 1", ""),
    "jumprelu: tanh of unscaled codes": ("jumprelu", J_PENALTY, "self.tanh_scale * f", "f"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, (owner, method), old, new = MUTATIONS[name]
    mutate(monkeypatch, owner, method, old, new)
    with pytest.raises(AssertionError):
        CHECKS[check]()
