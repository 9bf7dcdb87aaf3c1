"""Sparse and dense execution against the definitions, and against each other."""

from __future__ import annotations

import pytest
import torch

from trimtab.dictionaries.active import Active, DensePairs, SparsePairs, active_above
from trimtab.dictionaries.encoding import DenseEncoder

B, N, D = 23, 40, 6


def setup(floor: float, dense_above: float, **encoder: object) -> tuple[Active, torch.Tensor, torch.Tensor]:
    """Pairs above a floor, all pre-activations, and the mask of the active pairs."""
    generator = torch.Generator().manual_seed(0)
    z, W = (torch.randn(size, D, generator=generator, dtype=torch.float64) for size in (B, N))
    b = torch.randn(N, generator=generator, dtype=torch.float64)
    active = active_above(
        DenseEncoder(W, b, block_rows=7, **encoder),  # pyright: ignore[reportArgumentType]
        z,
        floor,
        dense_above=dense_above,
    )
    h = z @ W.T + b
    return active, h, h > floor


@pytest.mark.parametrize(("dense_above", "kind"), [(1.0, SparsePairs), (0.0, DensePairs)])
@pytest.mark.parametrize("floor", [-0.5, 0.0, 2.0, 100.0])
def test_products_follow_their_definitions(dense_above: float, kind: type, floor: float) -> None:
    if floor == 100.0 and kind is DensePairs:
        dense_above = -1.0
    active, h, mask = setup(floor, dense_above)
    assert isinstance(active, kind)
    generator = torch.Generator().manual_seed(1)
    W, G = (torch.randn(size, D, generator=generator, dtype=torch.float64) for size in (N, B))
    vector = torch.randn(N, generator=generator, dtype=torch.float64)
    values = active.h.square() * active.of_feature(vector) + 1  # not 0 outside the active pairs
    expected = (h.square() * vector + 1) * mask
    decoding = active.decode(values, W)
    assert torch.allclose(decoding.x, expected @ W)
    assert torch.allclose(active.by_feature(decoding.dot(G)), ((G @ W.T) * mask).sum(0))
    assert torch.allclose(active.collect(values, G), expected.T @ G)
    assert torch.allclose(active.by_feature(values), expected.sum(0))
    assert torch.allclose(active.total(values), expected.sum())
    assert torch.equal(active.fired(values), (expected > 0).any(0))


@pytest.mark.parametrize("dense_above", [1.0, 0.0])
def test_a_floor_for_each_feature(dense_above: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z, W = (torch.randn(size, D, generator=generator, dtype=torch.float64) for size in (B, N))
    floor = torch.rand(N, generator=generator, dtype=torch.float64)
    encoder = DenseEncoder(W, torch.zeros(N, dtype=torch.float64), block_rows=8)
    active = active_above(encoder, z, floor, dense_above=dense_above)
    assert torch.equal(active.by_feature(torch.ones_like(active.h)), ((z @ W.T) > floor).sum(0).double())


@pytest.mark.parametrize("dense_above", [1.0, 0.0])
def test_pairs_found_in_bfloat16_have_exact_pre_activations(dense_above: float) -> None:
    active, h, _ = setup(0.0, dense_above, dtype="bfloat16")
    if isinstance(active, SparsePairs):
        assert torch.allclose(active.h, h[active.pairs.row, active.pairs.feature], atol=1e-12)
    else:
        assert torch.allclose(active.h, h.relu(), atol=1e-12)


def test_many_pairs_are_a_table_and_few_a_list() -> None:
    assert isinstance(setup(0.0, 0.06)[0], DensePairs)
    assert isinstance(setup(6.5, 0.06)[0], SparsePairs)
