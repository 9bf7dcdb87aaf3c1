"""The sparse products against dense ones."""

from __future__ import annotations

import pytest
import torch

from trimtab.dictionaries.sparse import (
    ActivePairs,
    SparseCodes,
    collect_rows,
    decode_pairs,
    dot_pairs,
    largest,
    order_by_feature,
)


def random_pairs(rows: int = 7, n: int = 12, d: int = 5) -> tuple[ActivePairs, torch.Tensor]:
    """Pairs with rows of different lengths, one of them empty, and the dense codes they stand for."""
    generator = torch.Generator().manual_seed(3)
    dense = torch.rand(rows, n, generator=generator, dtype=torch.float64)
    dense[torch.rand(rows, n, generator=generator) < 0.6] = 0
    dense[2] = 0
    row, feature = dense.nonzero().unbind(1)
    start = torch.cat([torch.zeros(1, dtype=torch.long), (dense > 0).sum(1).cumsum(0)])
    return ActivePairs(dense[row, feature], feature, start), dense


@pytest.mark.parametrize(("n", "k"), [(640, 4), (640, 80), (641, 4), (512, 100), (12, 11)])
def test_largest_holds_the_k_largest_values(n: int, k: int) -> None:
    h = torch.randn(33, n, generator=torch.Generator().manual_seed(n + k))
    codes = largest(h, k)
    assert torch.equal(codes.values.sort(descending=True).values, h.sort(descending=True).values[:, :k])
    assert torch.equal(h.gather(1, codes.indices), codes.values)
    assert all(len(set(row)) == k for row in codes.indices.tolist())


def test_largest_finds_neighbours_that_share_a_group() -> None:
    h = torch.zeros(1, 64)
    h[0, [3, 11, 19, 27]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert sorted(largest(h, 2).indices[0].tolist()) == [3, 11]


def test_pairs_of_sparse_codes_are_the_same_codes() -> None:
    codes = SparseCodes(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5, 0], [1, 2]]))
    pairs = codes.pairs()
    assert pairs.row.tolist() == [0, 0, 1, 1]
    dense = torch.zeros(2, 6)
    dense[pairs.row, pairs.feature] = pairs.value
    assert torch.equal(dense, codes.dense(6))


def test_products_equal_dense_ones_with_uneven_and_empty_rows() -> None:
    pairs, dense = random_pairs()
    W = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = order_by_feature(pairs, 12)
    assert torch.allclose(decode_pairs(pairs, W), dense @ W, atol=1e-12)
    assert torch.allclose(collect_rows(order, pairs.value, X), dense.T @ X, atol=1e-12)


def test_some_of_the_pairs_keep_their_rows() -> None:
    pairs, dense = random_pairs()
    kept = pairs.where(pairs.value > 0.5)
    found = torch.zeros_like(dense)
    found[kept.row, kept.feature] = kept.value
    assert torch.equal(found, dense * (dense > 0.5))


def test_order_by_feature_is_the_same_for_wide_dictionaries() -> None:
    pairs, _ = random_pairs()
    narrow, wide = order_by_feature(pairs, 12), order_by_feature(pairs, 2**17)
    assert torch.equal(narrow.pair, wide.pair)
    assert torch.equal(narrow.start, wide.start[:13])


def test_dot_pairs_are_entries_of_the_dense_product() -> None:
    pairs, _ = random_pairs()
    W = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(dot_pairs(pairs, X, W), (X @ W.T)[pairs.row, pairs.feature], atol=1e-12)
