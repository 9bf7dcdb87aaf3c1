"""Matryoshka's groups, and what it is saved as."""

from __future__ import annotations

import pytest
import torch
from training_saes import D, K, N, batch, build

from trimtab.dictionaries.architectures.batchtopk import BatchTopKConfig, TrainableBatchTopK
from trimtab.dictionaries.architectures.matryoshka import MatryoshkaConfig, TrainableMatryoshka
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.folding import fold_scale
from trimtab.errors import UserError


def test_one_group_is_batchtopk() -> None:
    matryoshka = TrainableMatryoshka(MatryoshkaConfig(n_features=N, k=K, groups=(1.0,)), D, seed=3)
    plain = TrainableBatchTopK(BatchTopKConfig(n_features=N, k=K), D, seed=3)
    x = batch().float()
    one, other = matryoshka.backward(x), plain.backward(x)
    assert torch.allclose(one.total, other.total)
    for a, b in zip(matryoshka.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)  # pyright: ignore[reportArgumentType]


def test_what_is_saved_computes_what_was_trained() -> None:
    sae, x = build("matryoshka"), batch()
    sae.constrain()
    found = sae.calibrate(x)
    assert found["l0"] == pytest.approx(K)
    exported = sae.export(DictionaryInfo(architecture="matryoshka"))
    assert exported.architecture == "jumprelu"
    codes = exported.encode(x)
    h = sae.pre_activations(x)
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
