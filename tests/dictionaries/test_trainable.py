"""What every SAE in training has in common: its start, counts of silent features, unit rows, schedules, refusals."""

from __future__ import annotations

import pytest
import torch
from training_saes import ROWS, D, K, N, batch, build

from trimtab.dictionaries.architectures.topk import TopKConfig, TrainableTopK
from trimtab.dictionaries.topk_like import TopKLikeConfig
from trimtab.dictionaries.trainable import geometric_median
from trimtab.errors import UserError


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


def test_batchtopk_keeps_k_times_the_rows_whatever_the_last_batch_kept() -> None:
    x = batch()
    for factor in (1.0, 1e-3, 1.3, 1e6):
        sae = build("batchtopk")
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
    full = sae.W_dec.grad.clone()
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
