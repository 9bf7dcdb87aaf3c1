"""Matryoshka's gradients against automatic differentiation of the dense loss, in float64, and its groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.dictionaries.architectures.batchtopk import BatchTopKConfig, TrainableBatchTopK
from trimtab.dictionaries.architectures.matryoshka import MatryoshkaConfig, TrainableMatryoshka
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.folding import fold_scale
from trimtab.errors import UserError

D, N, K, ROWS = 10, 48, 5, 37
GROUPS = (1 / 12, 1 / 6, 1 / 4, 1 / 2)
ENDS = (4, 12, 24, 48)


def build(**settings: object) -> TrainableMatryoshka:
    config = MatryoshkaConfig(n_features=N, k=K, block_rows=16, groups=GROUPS, **settings)  # pyright: ignore[reportArgumentType]
    sae = TrainableMatryoshka(config, D, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in sae.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return sae


def batch() -> Tensor:
    return 2 * torch.randn(ROWS, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5


def dense_loss(sae: TrainableMatryoshka, x: Tensor, dead: Tensor) -> Tensor:
    """The loss from its definition: one reconstruction per prefix, and AuxK on the residual of the last."""
    z = x - sae.b_dec if sae.config.apply_b_dec_to_input else x
    h = z @ sae.W_enc_rows.T + sae.b_enc
    f = h.relu() * (h >= h.flatten().sort(descending=True).values[K * len(x) - 1])
    loss, x_hat = torch.zeros((), dtype=torch.float64), x
    for end in ENDS:
        x_hat = f[:, :end] @ sae.W_dec[:end] + sae.b_dec
        loss = loss + (x - x_hat).square().sum(1).mean()
    if dead.any():
        residual = (x - x_hat).detach()
        h_dead = h[:, dead]
        k_aux = min(D // 2, int(dead.sum()))
        kept = h_dead >= h_dead.sort(dim=1, descending=True).values[:, k_aux - 1 : k_aux]
        rebuilt = (h_dead.relu() * kept) @ sae.W_dec[dead]
        variance = (residual - residual.mean(0)).square().sum()
        loss = loss + sae.config.aux_coefficient * (residual - rebuilt).square().sum() / variance
    return loss


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("n_dead", [0, 3, 20])
def test_gradients_equal_the_dense_reference(apply_b_dec_to_input: bool, n_dead: int) -> None:
    sae = build(apply_b_dec_to_input=apply_b_dec_to_input, aux_coefficient=2.0, dead_after=10)
    dead = torch.zeros(N, dtype=torch.bool)
    dead[torch.randperm(N, generator=torch.Generator().manual_seed(5))[:n_dead]] = True
    sae.tokens_since_fired[dead] = 11
    x = batch()
    expected_loss = dense_loss(sae, x, dead)
    expected = torch.autograd.grad(expected_loss, list(sae.parameters()))
    step = sae.backward(x)
    assert step.loss.item() == pytest.approx(expected_loss.item(), rel=1e-10)
    for (name, parameter), reference in zip(sae.named_parameters(), expected, strict=True):
        assert parameter.grad is not None
        error = (parameter.grad - reference).abs().max() / reference.abs().max()
        assert error < 1e-10, name


def test_a_group_without_active_features_changes_nothing() -> None:
    sae = build()
    sae.b_enc.data[4:12] = -1e6
    x = batch()
    none_dead = torch.zeros(N, dtype=torch.bool)
    expected = torch.autograd.grad(dense_loss(sae, x, none_dead), list(sae.parameters()))
    sae.backward(x)
    for parameter, reference in zip(sae.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, reference, atol=1e-10)  # pyright: ignore[reportArgumentType]


def test_one_group_is_batchtopk() -> None:
    matryoshka = TrainableMatryoshka(MatryoshkaConfig(n_features=N, k=K, groups=(1.0,)), D, seed=3)
    plain = TrainableBatchTopK(BatchTopKConfig(n_features=N, k=K), D, seed=3)
    x = batch().float()
    one, other = matryoshka.backward(x), plain.backward(x)
    assert torch.allclose(one.loss, other.loss)
    for a, b in zip(matryoshka.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)  # pyright: ignore[reportArgumentType]


def test_the_reported_squared_error_is_the_full_reconstructions() -> None:
    sae, x = build(), batch()
    z = x - sae.b_dec
    h = z @ sae.W_enc_rows.T + sae.b_enc
    f = h.relu() * (h >= h.flatten().sort(descending=True).values[K * len(x) - 1])
    expected = (x - f @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    assert sae.backward(x).squared_error.item() == pytest.approx(expected.item())


def test_what_is_saved_computes_what_was_trained() -> None:
    sae, x = build(), batch()
    sae.constrain()
    found = sae.calibrate(x)
    assert found["l0"] == pytest.approx(K)
    exported = sae.export(DictionaryInfo(architecture="matryoshka"))
    assert exported.architecture == "jumprelu"
    codes = exported.encode(x)
    h = (x - sae.b_dec) @ sae.W_enc_rows.T + sae.b_enc
    assert torch.allclose(codes, h * (h > sae.threshold))
    scale = 3.7
    assert torch.allclose(fold_scale(exported, scale).encode(x / scale), codes / scale)


def test_default_groups_follow_the_paper_in_number_and_fill_the_dictionary() -> None:
    config = MatryoshkaConfig(n_features=4096, k=8)
    assert config.group_sizes() == (128, 256, 512, 1024, 2176)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": (0.5, 0.4)}, r"groups \(0.5, 0.4\): the shares sum to 0.9, not to 1"),
        ({"groups": (0.001, 0.999)}, "they leave a group of 48 features empty"),
        ({"groups": (-0.5, 1.5)}, "they leave a group of 48 features empty"),
        ({"groups": ()}, "the shares sum to 0, not to 1"),
    ],
)
def test_impossible_groups_are_named(settings: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MatryoshkaConfig(n_features=N, k=K, **settings)
