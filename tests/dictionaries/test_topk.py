"""TopK inference against a slow reading of the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.dictionaries.architectures.batchtopk import BatchTopKConfig, TrainableBatchTopK
from trimtab.dictionaries.architectures.topk import TopK, TopKConfig, TrainableTopK
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.folding import fold_scale
from trimtab.errors import UserError

D, N, K = 6, 20, 3


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def rows(n: int = 11) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def reference(x: Tensor, w: dict[str, Tensor], *, minus_bias: bool, rescale: bool) -> tuple[Tensor, Tensor]:
    """Codes and reconstruction, one number at a time."""
    f = torch.zeros(len(x), N, dtype=torch.float64)
    for b, row in enumerate(x):
        row = row - w["b_dec"] if minus_bias else row
        h = [float(row @ w["W_enc"][:, i] + w["b_enc"][i]) for i in range(N)]
        if rescale:
            h = [h_i * float(w["W_dec"][i].norm()) for i, h_i in enumerate(h)]
        for i in sorted(range(N), key=lambda i: -h[i])[:K]:
            f[b, i] = max(h[i], 0.0)
    unit = w["W_dec"] / w["W_dec"].norm(dim=1, keepdim=True) if rescale else w["W_dec"]
    return f, torch.stack([sum((f[b, i] * unit[i] for i in range(N)), w["b_dec"]) for b in range(len(x))])


@pytest.mark.parametrize("minus_bias", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_encode_and_decode_follow_the_definition(minus_bias: bool, rescale: bool) -> None:
    w, x = weights(), rows()
    w["b_enc"] -= 6.0  # so that some of the k largest are negative
    sae = TopK(**w, k=K, apply_b_dec_to_input=minus_bias, rescale_acts_by_decoder_norm=rescale)
    f, x_hat = reference(x, w, minus_bias=minus_bias, rescale=rescale)
    assert (f > 0).sum(1).min() < K
    assert torch.allclose(sae.encode(x), f, atol=1e-12)
    assert torch.allclose(sae.decode(f), x_hat, atol=1e-12)
    codes = sae.encode_sparse(x)
    assert codes.values.shape == codes.indices.shape == (len(x), K)
    assert torch.allclose(codes.dense(N), f, atol=1e-12)
    assert torch.allclose(sae.decode_sparse(codes), x_hat, atol=1e-12)


def test_encode_keeps_leading_dimensions_and_names_features() -> None:
    sae = TopK(**weights(), k=K)
    x = rows(12).reshape(2, 3, 2, D)
    assert torch.equal(sae.encode(x).flatten(0, 2), sae.encode(x.flatten(0, 2)))
    ids = torch.tensor([4, 0, 17])
    assert torch.equal(sae.encode_features(x, ids), sae.encode(x)[..., ids])
    assert sae.encode(torch.zeros(0, D)).shape == (0, N)
    assert sae.encode(x[0, 0, 0]).shape == (N,)


@pytest.mark.parametrize("k", [0, -1, N + 1])
def test_a_k_that_cannot_be_is_named(k: int) -> None:
    with pytest.raises(UserError, match=rf"k {k}: the dictionary has {N} features"):
        TopK(**weights(), k=k)


def test_exported_topk_gives_the_training_codes_in_model_units() -> None:
    trained = TrainableTopK(TopKConfig(n_features=N, k=K), D, seed=2, dtype=torch.float64)
    for parameter in (trained.b_enc, trained.b_dec, trained.W_enc_rows):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    scale, x = 0.125, 8 * rows()
    sae = fold_scale(trained.export(DictionaryInfo(architecture="topk", model="m")), scale)
    pairs = trained.active_pairs(trained.encoder_input(scale * x))
    expected = torch.zeros(len(x), N, dtype=torch.float64)
    expected[pairs.row, pairs.feature] = pairs.value / scale
    assert torch.allclose(sae.encode(x), expected.detach(), atol=1e-10)
    assert (sae.info.architecture, sae.info.model) == ("topk", "m")
    assert sae.info.metadata["training"]["k"] == K


def test_exported_batchtopk_is_a_jumprelu_with_mean_l0_k_on_the_calibration_rows() -> None:
    trained = TrainableBatchTopK(BatchTopKConfig(n_features=N, k=K, block_rows=64), D, seed=2, dtype=torch.float64)
    scale, x = 0.125, 8 * rows(400)
    found = trained.calibrate(scale * x)
    sae = fold_scale(trained.export(DictionaryInfo(architecture="batchtopk")), scale)
    f = sae.encode(x)
    assert sae.architecture == "jumprelu"
    assert (f > 0).sum() == K * len(x)
    assert found["l0"] == K
    h = (scale * x - trained.b_dec) @ trained.W_enc_rows.T + trained.b_enc
    kept = h.flatten().sort(descending=True).values[: K * len(x)]
    assert torch.allclose(f[f > 0].sort(descending=True).values, kept.detach() / scale)
    assert torch.allclose(sae.threshold, sae.threshold[:1].expand(N), rtol=1e-12)


def test_batchtopk_calibration_with_too_few_positive_codes_keeps_all_of_them() -> None:
    trained = TrainableBatchTopK(BatchTopKConfig(n_features=N, k=K), D, seed=2)
    trained.b_enc.data -= 100
    assert trained.calibrate(rows(50).float()) == {"l0": 0.0, "threshold": 0.0}
