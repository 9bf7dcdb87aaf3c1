"""Criteria of a model whose next-token distribution is known in closed form: one direction decides one token's logit.

The head reads a direction u into token t with weight s and gives every other of the V tokens the logit 0. Behind the
last layer there is only a norm, so that adding c·w to the residual x gives t the logit

    z(c) = s · (u·x + c u·w) / √(‖x + c·w‖² / d + ε),

and all else follows from z: with L = log(e^z + V − 1), log p_t = z − L, and −L for each of the others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from trimtab.lm import LanguageModel, TokenBatch, capture
from trimtab.selection import (
    DeltaConfidence,
    EntropyChange,
    GradientAttribution,
    KLDivergence,
    rank_by,
    scoring,
)
from trimtab.selection import gradient_attribution as module

PREFIX, SITE, TOKEN, SCALE = "From my experience,", "resid_post.3", 77, 2.0


@dataclass
class OneToken:
    """The model, rows of which the first is u, and the closed forms, in plain floats."""

    model: LanguageModel
    dictionary: Any
    u: list[float]
    x: list[float]

    def z(self, i: int, c: float) -> float:
        row = self.dictionary.W_dec[i].double().tolist()
        length = math.sqrt(sum(v * v for v in row))
        moved = [x + c * w / length for x, w in zip(self.x, row, strict=True)]
        return SCALE * sum(a * b for a, b in zip(self.u, moved, strict=True)) / math.sqrt(
            sum(v * v for v in moved) / len(moved) + self.model.hf.config.rms_norm_eps
        )  # fmt: skip

    @property
    def others(self) -> int:
        return self.model.vocab_size - 1

    def log_mass(self, z: float) -> float:
        return math.log(math.exp(z) + self.others)

    def confidence(self, i: int, c: float, k: int) -> float:
        """C_k: t is among the k likeliest where z > 0, and the last of all where z < 0."""
        z = self.z(i, c)
        return self.log_mass(z) - max(z, 0) / k

    def p(self, i: int, c: float) -> float:
        z = self.z(i, c)
        return math.exp(z - self.log_mass(z))

    def entropy(self, i: int, c: float) -> float:
        p = self.p(i, c)
        return -p * math.log(p) - (1 - p) * math.log((1 - p) / self.others)

    def kl(self, i: int, c: float) -> float:
        p, q = self.p(i, c), self.p(i, 0)
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    def slope(self, i: int, k: int) -> float:
        """dC_k/dc at 0, where z > 0: dC_k/dz = p_t − 1/k, and dz/dc by the quotient rule."""
        row = self.dictionary.W_dec[i].double().tolist()
        length = math.sqrt(sum(v * v for v in row))
        w, d = [v / length for v in row], len(row)
        r = math.sqrt(sum(v * v for v in self.x) / d + self.model.hf.config.rms_norm_eps)
        ux, uw, xw = (
            sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((self.u, self.x), (self.u, w), (self.x, w))
        )
        return (self.p(i, 0) - 1 / k) * SCALE * (uw / r - ux * xw / (d * r**3))


@pytest.fixture
def one_token(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> OneToken:
    model = LanguageModel.from_hf(copy.deepcopy(tiny_llama.hf), tiny_llama.tokenizer, "one-token")
    batch = TokenBatch.full(torch.tensor([model.encode_text(PREFIX)]))
    x = capture(model, batch, [SITE])[model.site(SITE)][0, -1]
    u = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))
    u = u / u.norm()
    u = u if u @ x > 0 else -u
    with torch.no_grad():
        model.layout.final_norm.weight.fill_(1)
        model.layout.head.weight.zero_()
        model.layout.head.weight[TOKEN] = SCALE * u
    dictionary = make_rows(12, site=SITE)
    dictionary.W_dec.data[0] = 2.5 * u
    return OneToken(model=model, dictionary=dictionary, u=u.double().tolist(), x=x.double().tolist())


def check(one: OneToken, dose: float, k: int) -> None:
    settings: dict[str, Any] = {"dose": dose, "prefixes": (PREFIX,)}
    criteria = [
        DeltaConfidence(k=k, **settings), EntropyChange(**settings), KLDivergence(**settings),
        GradientAttribution(k=k, **settings),
    ]  # fmt: skip
    confidence, entropy, kl, gradient = rank_by(one.model, one.dictionary, criteria)
    m = one.dictionary.feature_stats.max_activation
    assert one.z(0, 0) > 0.05  # t is the likeliest token at first
    for table, expected in (
        (confidence, lambda i, c: one.confidence(i, c, k) - one.confidence(i, 0, k)),
        (entropy, lambda i, c: one.entropy(i, c) - one.entropy(i, 0)),
        (kl, one.kl),
        (gradient, lambda i, c: c * one.slope(i, k)),
    ):
        assert sorted(table.feature.tolist()) == list(range(12))
        for i, score in zip(table.feature.tolist(), table.score.tolist(), strict=True):
            assert score == pytest.approx(expected(i, dose * float(m[i])), abs=2e-5), table.criterion


@pytest.mark.parametrize("dose", [10.0, 0.7, -10.0])
@pytest.mark.parametrize("k", [1, 4])
def test_a_planted_direction_in_closed_form(one_token: OneToken, dose: float, k: int) -> None:
    check(one_token, dose, k)


def test_amplified_the_planted_direction_sharpens_and_taken_away_it_flattens(one_token: OneToken) -> None:
    """Both ends: feature 0 is u itself, so that its ΔC_1 is the lowest at a positive dose; its other sign raises C_1
    until t is the least likely of all."""
    down = DeltaConfidence(prefixes=(PREFIX,))
    (table,) = rank_by(one_token.model, one_token.dictionary, [down])
    assert table.bottom(1).feature.tolist() == [0]
    assert table.bottom(1).direction.tolist() == ["down"]
    m = float(one_token.dictionary.feature_stats.max_activation[0])
    assert one_token.z(0, -10 * m) < 0 < one_token.z(0, 0)


def no_dose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "coefficients", lambda _unit, dose, _x, _m=None: dose)


def sharper_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    original = DeltaConfidence.reducer
    monkeypatch.setattr(DeltaConfidence, "reducer", lambda self, target: lambda block: -original(self, target)(block))


def base_entropy_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntropyChange, "reducer", lambda _self, _target: lambda block: block.entropy)


def entropy_in_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    original = EntropyChange.reducer
    monkeypatch.setattr(
        EntropyChange, "reducer", lambda self, target: lambda block: original(self, target)(block) / math.log(2)
    )


def always_the_top_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module.GradientAttribution, "quantity", lambda _self, _target: lambda log_probs: -log_probs.max()
    )


@pytest.mark.parametrize(
    "mutation",
    [
        no_dose,
        sharper_is_up,
        base_entropy_left_out,
        entropy_in_bits,
        always_the_top_token,
    ],
)
def test_mutation(one_token: OneToken, monkeypatch: pytest.MonkeyPatch, mutation: Callable[..., None]) -> None:
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        check(one_token, 0.7, 4)
