"""Folding norms and the input scale changes units and nothing else: float64, every architecture."""

from __future__ import annotations

import pytest
import torch

from trimtab.dictionaries import ARCHITECTURES, fold_norms, fold_scale

SCALE = 0.037


def rows(d: int) -> torch.Tensor:
    return 50 * torch.randn(200, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_folded_sae_computes_the_scaled_one_divided_by_the_scale(random_sae, architecture, apply_b_dec_to_input):
    trained = random_sae(architecture, dtype=torch.float64, apply_b_dec_to_input=apply_b_dec_to_input, unit_rows=True)
    folded, x = fold_scale(trained, SCALE), rows(trained.d_in)
    torch.testing.assert_close(folded.encode(x), trained.encode(SCALE * x) / SCALE, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(folded(x), trained(SCALE * x) / SCALE, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(folded.W_enc, trained.W_enc, rtol=1e-12, atol=0)
    assert type(folded) is type(trained)
    assert folded.settings == trained.settings


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_norms_move_into_the_codes_before_the_scale(random_sae, architecture):
    trained = random_sae(architecture, dtype=torch.float64)
    norms = trained.W_dec.norm(dim=1)
    folded, x = fold_scale(trained, SCALE), rows(trained.d_in)
    torch.testing.assert_close(folded.decoder_norms, torch.ones(20, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(folded.encode(x), trained.encode(SCALE * x) * norms / SCALE, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(folded(x), trained(SCALE * x) / SCALE, rtol=1e-11, atol=1e-11)


def test_a_topk_sae_that_rescales_keeps_its_function_and_rescales_no_more(random_sae):
    trained = random_sae("topk", dtype=torch.float64, rescale_acts_by_decoder_norm=True)
    folded, x = fold_norms(trained), rows(trained.d_in)
    assert folded.settings["rescale_acts_by_decoder_norm"] is False
    torch.testing.assert_close(folded.decoder_norms, torch.ones(20, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(folded.encode(x), trained.encode(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(folded(x), trained(x), rtol=1e-11, atol=1e-11)


def test_a_topk_sae_with_free_norms_keeps_its_rows_since_other_features_would_win(random_sae):
    trained = random_sae("topk", dtype=torch.float64, rescale_acts_by_decoder_norm=False)
    x = rows(trained.d_in)
    assert torch.equal(fold_norms(trained).W_dec, trained.W_dec)
    folded = fold_scale(trained, SCALE)
    torch.testing.assert_close(folded(x), trained(SCALE * x) / SCALE, rtol=1e-11, atol=1e-11)
    rescaling = random_sae("topk", dtype=torch.float64, rescale_acts_by_decoder_norm=True)
    assert not torch.equal(rescaling.encode(x) > 0, trained.encode(x) > 0)


def test_a_zero_row_stays_zero(random_sae):
    trained = random_sae("standard", dtype=torch.float64)
    trained.W_dec.data[5] = 0
    folded = fold_scale(trained, SCALE)
    assert folded.W_dec[5].abs().sum() == 0
    assert all(weight.isfinite().all() for weight in folded.parameters())


def test_the_original_is_left_alone(random_sae):
    trained = random_sae("gated")
    before = trained.fingerprint
    fold_scale(trained, SCALE)
    del trained.fingerprint
    assert trained.fingerprint == before


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_must_be_positive_and_finite(random_sae, scale):
    with pytest.raises(ValueError, match="the input scale must be positive and finite"):
        fold_scale(random_sae("standard"), scale)
