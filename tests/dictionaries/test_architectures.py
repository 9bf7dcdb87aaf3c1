"""Codes and reconstructions against references written feature by feature in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.dictionaries import ARCHITECTURES, SAE, JumpReLU, Standard, Supervised, TopK, architecture_class
from trimtab.errors import UserError

ALL = sorted(ARCHITECTURES)


def reference_codes(sae: SAE, x: np.ndarray) -> np.ndarray:
    """f(x) of one row, one feature at a time, from the architectures' definitions."""
    w: dict[str, Any] = {name: getattr(sae, name).detach().double().numpy() for name in sae.shapes}
    d, n = w["W_enc"].shape
    z = [(x[j] - w["b_dec"][j]) if sae.apply_b_dec_to_input else x[j] for j in range(d)]
    p = [sum(z[j] * w["W_enc"][j, i] for j in range(d)) for i in range(n)]
    if sae.architecture == "standard":
        return np.array([max(p[i] + w["b_enc"][i], 0.0) for i in range(n)])
    if sae.architecture == "jumprelu":
        pre = [p[i] + w["b_enc"][i] for i in range(n)]
        return np.array([max(pre[i], 0.0) if pre[i] > w["threshold"][i] else 0.0 for i in range(n)])
    if sae.architecture == "gated":
        magnitude = [max(p[i] * math.exp(w["r_mag"][i]) + w["b_mag"][i], 0.0) for i in range(n)]
        return np.array([magnitude[i] if p[i] + w["b_gate"][i] > 0 else 0.0 for i in range(n)])
    if isinstance(sae, Supervised):
        score, first, f = [p[i] + w["b_enc"][i] for i in range(n)], 0, np.zeros(n)
        read: list[int] = []
        for count in sae.factors:
            best = max(range(first, first + count), key=lambda i: score[i])
            read, first = [*read, best], first + count
        for _ in range(sae.passes):
            first = 0
            for factor, count in enumerate(sae.factors):
                rest = z - sum(w["size"][v] * w["W_dec"][v] for k, v in enumerate(read) if k != factor)
                left = rest @ w["W_left"] + w["b_left"]
                read[factor] = max(range(first, first + count), key=lambda i: left[i])
                first += count
        f[read] = w["size"][read]
        return f
    assert isinstance(sae, TopK)
    norms = [math.sqrt(sum(v * v for v in row)) for row in w["W_dec"]]
    score = [(p[i] + w["b_enc"][i]) * (norms[i] if sae.rescale_acts_by_decoder_norm else 1.0) for i in range(n)]
    kept = sorted(range(n), key=lambda i: -score[i])[: sae.k]
    return np.array([max(score[i], 0.0) if i in kept else 0.0 for i in range(n)])


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ALL)
def test_codes_equal_the_definition(random_sae, architecture, apply_b_dec_to_input):
    sae = random_sae(architecture, apply_b_dec_to_input=apply_b_dec_to_input, dtype=torch.float64)
    x = torch.randn(2, 9, sae.d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f = sae.encode(x)
    expected = np.array([[reference_codes(sae, row.numpy()) for row in batch] for batch in x])
    np.testing.assert_allclose(f.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert 0 < (f > 0).double().mean() < 1
    rows = sae.W_dec.numpy()
    x_hat = [[sum(f_i * row for f_i, row in zip(code, rows, strict=True)) for code in batch] for batch in f.numpy()]
    np.testing.assert_allclose(sae.decode(f).numpy(), np.array(x_hat) + sae.b_dec.numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(sae(x).numpy(), sae.decode(f).numpy())


@pytest.mark.parametrize("architecture", ALL)
def test_encode_features_gives_the_columns_asked_for(random_sae, architecture):
    sae = random_sae(architecture, dtype=torch.float64)
    x = torch.randn(3, 5, sae.d_in, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids = torch.tensor([4, 17, 0, 4])
    torch.testing.assert_close(sae.encode_features(x, ids), sae.encode(x)[..., ids], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_encode_features_touches_no_other_column(random_sae, architecture):
    sae = random_sae(architecture)
    sae.W_enc.data[:, 1] = float("nan")
    x = torch.randn(5, sae.d_in)
    assert sae.encode(x)[:, 1].isnan().all() or architecture != "standard"
    assert sae.encode_features(x, torch.tensor([0, 2, 3])).isfinite().all()


def test_a_jumprelu_feature_at_its_threshold_is_silent():
    x = torch.tensor([[0.5], [0.75]])
    one = torch.ones(1, 1)
    sae = JumpReLU(one, torch.zeros(1), one, torch.zeros(1), threshold=torch.tensor([0.5]))
    assert sae.encode(x).tolist() == [[0.0], [0.75]]


def test_a_jumprelu_threshold_below_zero_lets_no_negative_code_through():
    one = torch.ones(1, 1)
    sae = JumpReLU(one, torch.zeros(1), one, torch.zeros(1), threshold=torch.tensor([-1.0]))
    assert sae.encode(torch.tensor([[-0.5], [0.25]])).tolist() == [[0.0], [0.25]]


def test_activations_of_lower_precision_are_read_in_the_weights(random_sae):
    sae = random_sae("standard")
    x = torch.randn(4, sae.d_in)
    assert torch.equal(sae.encode(x.bfloat16()), sae.encode(x.bfloat16().float()))


def test_directions_have_norm_one_and_zero_rows_stay_zero(random_sae):
    sae = random_sae("standard")
    sae.W_dec.data[3] = 0
    norms = sae.directions.norm(dim=1)
    assert norms[3] == 0
    torch.testing.assert_close(norms[torch.arange(20) != 3], torch.ones(19))


def test_what_was_computed_from_the_weights_follows_them(random_sae):
    sae = random_sae("standard")
    assert sae.directions.dtype == torch.float32
    assert sae.double().directions.dtype == torch.float64


def test_fingerprints_tell_weights_and_settings_apart(random_sae):
    prints = [
        random_sae("topk").fingerprint,
        random_sae("topk", seed=1).fingerprint,
        random_sae("topk", k=2).fingerprint,
        random_sae("topk", apply_b_dec_to_input=False).fingerprint,
        random_sae("standard").fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert random_sae("topk").fingerprint == prints[0]


def test_weights_of_unequal_shape_are_named():
    with pytest.raises(
        UserError, match=r"tensor b_enc of shape \[1\]: a dictionary of 3 features of width 2 needs \[3\]"
    ):
        Standard(torch.ones(2, 3), torch.ones(1), torch.ones(3, 2), torch.ones(2))


def test_an_unknown_architecture_is_named():
    with pytest.raises(UserError, match=r"architecture 'crosscoder': trimtab reads .*gated.*; batchtopk .* jumprelu"):
        architecture_class("crosscoder")
