"""Codes as a list: the same codes and reconstructions as dense ones, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trimtab.dictionaries import SAE, Gated, JumpReLU, SparseCodes, Standard, TopK, sparse
from trimtab.dictionaries.base import Dictionary, DictionaryInfo

D, N, ROWS = 16, 400, 33


class Rectified(Dictionary):
    """A dictionary that is no SAE: it has `encode` and `decode` alone."""

    architecture = "rectified"

    def __init__(self, W_dec: torch.Tensor) -> None:
        super().__init__(DictionaryInfo(architecture="rectified"))
        self.W_dec = torch.nn.Parameter(W_dec)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W_dec.T - 13).relu()

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.W_dec + 1


def dictionary(name: str) -> Dictionary:
    draw = torch.Generator().manual_seed(0)
    W_dec = torch.randn(N, D, generator=draw, dtype=torch.float64)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    bias = torch.full((N,), -3.4, dtype=torch.float64)
    weights = {"W_enc": W_dec.T.clone(), "W_dec": W_dec * torch.linspace(0.5, 2, N)[:, None], "b_dec": W_dec[3].clone()}
    found: dict[str, Callable[[], Dictionary]] = {
        "standard": lambda: Standard(**weights, b_enc=bias),
        "jumprelu": lambda: JumpReLU(**weights, b_enc=0 * bias, threshold=-bias),
        "jumprelu of any threshold": lambda: JumpReLU(
            **weights, b_enc=bias, threshold=torch.linspace(-1, 1, N, dtype=torch.float64)
        ),
        "gated": lambda: Gated(**weights, b_gate=bias, b_mag=bias / 2, r_mag=0 * bias),
        "topk": lambda: TopK(**weights, b_enc=bias, k=5),
        "topk by decoder norm": lambda: TopK(**weights, b_enc=bias, k=5, rescale_acts_by_decoder_norm=True),
        "rectified": lambda: Rectified(4 * W_dec),
    }
    return found[name]()


def check(sae: Dictionary, *, listed: bool = True) -> None:
    x = 1.2 * torch.randn(ROWS, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[4] = 0
    x[5] = 6 * sae.directions[0]  # a row that has the code which unused slots name
    codes, f = sae.encode_sparse(x), sae.encode(x)
    assert f.count_nonzero() > ROWS
    assert isinstance(codes, SparseCodes) == listed
    if isinstance(codes, SparseCodes):
        assert torch.equal(codes.dense(N), f)
        assert codes.values.shape[1] < N / 10
    pairs = sae.encode_pairs(x)
    assert pairs.start.tolist() == [0, *(f > 0).sum(1).cumsum(0).tolist()]
    assert bool((pairs.value > 0).all())
    torch.testing.assert_close(torch.zeros_like(f).index_put_((pairs.row, pairs.feature), pairs.value), f)
    torch.testing.assert_close(sae.decode_sparse(codes), sae.decode(f))


@pytest.mark.parametrize(
    "name", ["standard", "jumprelu", "jumprelu of any threshold", "gated", "topk", "topk by decoder norm", "rectified"]
)
def test_a_list_of_codes_is_the_dense_codes(name: str) -> None:
    check(dictionary(name))


@pytest.mark.parametrize("name", ["standard", "rectified"])
def test_where_many_features_fire_codes_stay_dense(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "SPARSE_BELOW", 0.005)
    check(dictionary(name), listed=False)


def test_no_rows_and_rows_without_a_code() -> None:
    sae = dictionary("standard")
    assert isinstance(sae, SAE)
    for x in (torch.zeros(0, D, dtype=torch.float64), sae.b_dec.expand(2, D)):
        codes = sae.encode_sparse(x)
        assert isinstance(codes, SparseCodes)
        assert codes.values.shape == (len(x), 1)
        torch.testing.assert_close(sae.decode_sparse(codes), sae.b_dec.expand(len(x), D))


def lose_the_first_feature(patch: pytest.MonkeyPatch) -> None:
    """An unused slot of a row overwrites the code of the feature that it names."""
    patch.setattr(SparseCodes, "dense", lambda self, n: self.values.new_zeros(ROWS, n).scatter_(1, *self[::-1]))


def take_slots_of_the_row_before(patch: pytest.MonkeyPatch) -> None:
    original = torch.Tensor.cumsum
    patch.setattr(torch.Tensor, "cumsum", lambda self, dim: original(self, dim).roll(1))


@pytest.mark.parametrize("mistake", [lose_the_first_feature, take_slots_of_the_row_before], ids=lambda m: m.__name__)
def test_the_check_fails(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        check(dictionary("standard"))
