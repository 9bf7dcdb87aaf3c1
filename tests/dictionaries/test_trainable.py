"""Every gradient of the sparse steps against automatic differentiation of the dense loss, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.dictionaries.architectures.batchtopk import BatchTopKConfig, TrainableBatchTopK
from trimtab.dictionaries.architectures.topk import TopKConfig, TrainableTopK
from trimtab.dictionaries.topk_like import TopKLike, TopKLikeConfig
from trimtab.dictionaries.trainable import geometric_median
from trimtab.errors import UserError

D, N, K, ROWS = 10, 48, 5, 37


def build(arch: str, **settings: object) -> TopKLike:
    classes = {"topk": (TrainableTopK, TopKConfig), "batchtopk": (TrainableBatchTopK, BatchTopKConfig)}
    sae_class, config_class = classes[arch]
    config = config_class(n_features=N, k=K, block_rows=16, **settings)  # pyright: ignore[reportArgumentType]
    sae = sae_class(config, D, seed=1, dtype=torch.float64)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in sae.parameters():  # away from W_enc = W_decᵀ, unit rows and zero biases, where errors could cancel
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return sae


def batch(rows: int = ROWS) -> Tensor:
    return 2 * torch.randn(rows, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5


def dense_loss(sae: TopKLike, x: Tensor, arch: str, dead: Tensor) -> Tensor:
    """The loss from its definition, all features dense, for automatic differentiation."""
    z = x - sae.b_dec if sae.config.apply_b_dec_to_input else x
    h = z @ sae.W_enc_rows.T + sae.b_enc
    if arch == "topk":
        kept = h >= h.sort(dim=1, descending=True).values[:, K - 1 : K]
    else:
        kept = h >= h.flatten().sort(descending=True).values[K * len(x) - 1]
    f = h.relu() * kept
    x_hat = f @ sae.W_dec + sae.b_dec
    loss = (x - x_hat).square().sum(1).mean()
    if dead.any():
        residual = (x - x_hat).detach()
        h_dead = h[:, dead]
        k_aux = min(sae.config.k_aux or D // 2, int(dead.sum()))
        kept_dead = h_dead >= h_dead.sort(dim=1, descending=True).values[:, k_aux - 1 : k_aux]
        rebuilt = (h_dead.relu() * kept_dead) @ sae.W_dec[dead]
        variance = (residual - residual.mean(0)).square().sum()
        loss = loss + sae.config.aux_coefficient * (residual - rebuilt).square().sum() / variance
    return loss


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("n_dead", [0, 3, 20])
def test_gradients_equal_the_dense_reference(arch: str, apply_b_dec_to_input: bool, n_dead: int) -> None:
    sae = build(arch, apply_b_dec_to_input=apply_b_dec_to_input, aux_coefficient=2.0, dead_after=10)
    dead = torch.zeros(N, dtype=torch.bool)
    dead[torch.randperm(N, generator=torch.Generator().manual_seed(5))[:n_dead]] = True
    sae.tokens_since_fired[dead] = 11
    x = batch()
    expected_loss = dense_loss(sae, x, arch, dead)
    expected = torch.autograd.grad(expected_loss, list(sae.parameters()))
    step = sae.backward(x)
    assert step.n_dead == n_dead
    assert step.loss.item() == pytest.approx(expected_loss.item(), rel=1e-10)
    for (name, parameter), reference in zip(sae.named_parameters(), expected, strict=True):
        assert parameter.grad is not None
        error = (parameter.grad - reference).abs().max() / reference.abs().max()
        assert error < 1e-10, name


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_the_aux_loss_reaches_dead_features_and_the_decoder_bias(arch: str) -> None:
    sae, without = (build(arch, dead_after=10, aux_coefficient=c) for c in (1.0, 0.0))
    for s in (sae, without):
        s.b_enc.data[:8] = -100.0
        s.b_enc.data[:8] += 99.9  # silent, but with positive pre-activations for some rows
        s.tokens_since_fired[:8] = 11
        s.backward(batch())
    for name in ("W_enc_rows", "W_dec", "b_enc", "b_dec"):
        ours, plain = getattr(sae, name).grad, getattr(without, name).grad
        assert not torch.allclose(ours, plain), name
        if name != "b_dec":
            assert torch.equal(ours[8:], plain[8:]), name


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_features_chosen_in_bfloat16_have_codes_and_gradients_in_full_precision(arch: str) -> None:
    sae, exact = build(arch, encoder_dtype="bfloat16"), build(arch)
    x = batch()
    z = sae.encoder_input(x)
    pairs, exact_pairs = sae.active_pairs(z), exact.active_pairs(z)
    h = (z @ sae.W_enc_rows.T + sae.b_enc).detach()
    assert torch.allclose(pairs.value, h[pairs.row, pairs.feature].relu(), atol=1e-12)
    chosen, expected = (set(zip(p.row.tolist(), p.feature.tolist(), strict=True)) for p in (pairs, exact_pairs))
    assert len(chosen & expected) > 0.95 * len(expected)
    dense = torch.zeros_like(h, dtype=torch.bool)
    dense[pairs.row, pairs.feature] = True
    parameters = list(sae.parameters())
    f = ((x - sae.b_dec) @ sae.W_enc_rows.T + sae.b_enc).relu() * dense
    loss = (x - f @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    expected_grads = torch.autograd.grad(loss, parameters)
    sae.backward(x)
    for parameter, reference in zip(parameters, expected_grads, strict=True):
        assert torch.allclose(parameter.grad, reference, atol=1e-10)  # pyright: ignore[reportArgumentType]


def test_batchtopk_keeps_k_times_the_rows_whatever_the_last_batch_kept() -> None:
    x = batch()
    for factor in (1.0, 1e-3, 1.3, 1e6):
        sae = build("batchtopk")
        assert isinstance(sae, TrainableBatchTopK)
        sae.active_pairs(sae.encoder_input(x) * factor)
        h = sae.encoder_input(x) @ sae.W_enc_rows.T + sae.b_enc
        pairs = sae.active_pairs(sae.encoder_input(x))
        assert len(pairs.value) == K * ROWS
        expected = h.flatten().sort(descending=True).values[: K * ROWS]
        assert torch.allclose(pairs.value.sort(descending=True).values, expected)
        assert torch.allclose(h[pairs.row, pairs.feature], pairs.value)


def test_batchtopk_with_too_few_positive_codes_keeps_all_of_them() -> None:
    sae = build("batchtopk")
    sae.b_enc.data -= 100.0
    sae.b_enc.data[3] += 100.0
    z = sae.encoder_input(batch())
    positive = int(((z @ sae.W_enc_rows.T + sae.b_enc) > 0).sum())
    assert 0 < positive < K * ROWS
    assert len(sae.active_pairs(z).value) == positive


def test_batchtopk_running_threshold_follows_the_smallest_kept_code() -> None:
    sae = build("batchtopk", threshold_momentum=0.9)
    assert isinstance(sae, TrainableBatchTopK)
    smallest = [sae.active_pairs(sae.encoder_input(x)).value.min() for x in (batch(), 2 * batch())]
    sae.backward(batch())
    assert torch.equal(sae.threshold, smallest[0])
    sae.backward(2 * batch())
    assert sae.threshold.item() == pytest.approx((0.9 * smallest[0] + 0.1 * smallest[1]).item())


def test_dead_features_are_counted_in_rows() -> None:
    sae = build("topk")
    sae.b_enc.data[:] = 0.0
    sae.b_enc.data[7] = -1e6
    sae.backward(batch())
    sae.backward(batch())
    assert sae.tokens_since_fired[7] == 2 * ROWS
    assert sae.tokens_since_fired.min() == 0


def test_projected_gradient_is_orthogonal_and_rows_return_to_norm_one() -> None:
    sae = build("topk")
    sae.constrain()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(N, dtype=torch.float64))
    sae.backward(batch())
    full = sae.W_dec.grad.clone()  # pyright: ignore[reportOptionalMemberAccess]
    sae.project_gradients()
    assert sae.W_dec.grad is not None
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-12
    radial = (full - sae.W_dec.grad) / sae.W_dec
    assert torch.allclose(radial, radial[:, :1].expand_as(radial))


def test_k_shrinks_from_k_start_in_equal_ratios_over_its_share_of_the_training() -> None:
    sae = TrainableTopK(TopKConfig(n_features=N, k=2, k_start=8, k_anneal_share=0.5), D)
    seen = []
    for done in (0, 0.25, 0.5, 0.99):
        sae.set_progress(done)
        seen.append(int(sae.metrics()["k"]))
    assert seen == [8, 4, 2, 2]
    assert TrainableTopK(TopKConfig(n_features=N, k=2), D).metrics() == {"k": 2}


def test_geometric_median_of_a_symmetric_cloud_ignores_an_outlier() -> None:
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert geometric_median(corners + 3).tolist() == pytest.approx([3, 3], abs=1e-4)
    far = torch.cat([corners.repeat(20, 1), torch.tensor([[1e4, 0.0]], dtype=torch.float64)])
    assert geometric_median(far).norm() < 0.1 < far.mean(0).norm()


def test_weights_start_as_transposes_with_unit_rows_and_the_chosen_bias() -> None:
    sae = TrainableTopK(TopKConfig(n_features=N, k=K, b_dec_init="mean"), D, seed=3)
    assert torch.equal(sae.W_enc_rows, sae.W_dec)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(N))
    x = batch().float()
    sae.initialise(x)
    assert torch.allclose(sae.b_dec, x.mean(0))
    other = TrainableTopK(TopKConfig(n_features=N, k=K), D, seed=4)
    assert not torch.equal(sae.W_dec, other.W_dec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_features": 0, "k": 1}, "n_features 0"),
        ({"n_features": -4, "k": 1}, "n_features -4"),
        ({"n_features": 8, "k": 8}, "k 8: it must be from 1 to n_features − 1 = 7"),
        ({"n_features": 8, "k": 0}, "k 0"),
        ({"n_features": 8, "k": 2, "aux_coefficient": float("nan")}, "aux_coefficient nan"),
        ({"n_features": 8, "k": 2, "k_aux": 0}, "k_aux 0"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        TopKLikeConfig(**settings)  # pyright: ignore[reportArgumentType]
