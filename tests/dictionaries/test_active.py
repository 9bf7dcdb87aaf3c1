"""Sparse and dense execution against the definitions, and against each other."""

from __future__ import annotations

import pytest
import torch

from trimtab.dictionaries.active import Active, DensePairs, Execution, SparsePairs, active_above
from trimtab.dictionaries.encoding import DenseEncoder

B, N, D = 23, 40, 6


def setup(floor: float, execution: Execution | None, **encoder: object) -> tuple[Active, torch.Tensor, torch.Tensor]:
    """Pairs above a floor, all pre-activations, and the mask of the active pairs."""
    generator = torch.Generator().manual_seed(0)
    z, W = (torch.randn(size, D, generator=generator, dtype=torch.float64) for size in (B, N))
    b = torch.randn(N, generator=generator, dtype=torch.float64)
    active = active_above(
        DenseEncoder(W, b, block_rows=7, **encoder),  # pyright: ignore[reportArgumentType]
        z,
        floor,
        execution=execution,
    )
    h = z @ W.T + b
    return active, h, h > floor


@pytest.mark.parametrize(
    ("execution", "kind"), [("sparse", SparsePairs), ("screened", SparsePairs), ("dense", DensePairs)]
)
@pytest.mark.parametrize("floor", [-0.5, 0.0, 2.0, 100.0])
def test_products_follow_their_definitions(execution: Execution, kind: type, floor: float) -> None:
    active, h, mask = setup(floor, execution)
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


@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_a_floor_for_each_feature(execution: Execution) -> None:
    generator = torch.Generator().manual_seed(0)
    z, W = (torch.randn(size, D, generator=generator, dtype=torch.float64) for size in (B, N))
    floor = torch.rand(N, generator=generator, dtype=torch.float64)
    encoder = DenseEncoder(W, torch.zeros(N, dtype=torch.float64), block_rows=8)
    active = active_above(encoder, z, floor, execution=execution)
    assert torch.equal(active.by_feature(torch.ones_like(active.h)), ((z @ W.T) > floor).sum(0).double())


def test_pairs_found_in_bfloat16_have_exact_pre_activations() -> None:
    active, h, _ = setup(0.0, "sparse", precision="bf16")
    assert isinstance(active, SparsePairs)
    assert torch.allclose(active.h, h[active.pairs.row, active.pairs.feature], atol=1e-12)


def test_a_table_in_bfloat16_is_made_of_rounded_operands() -> None:
    active, h, mask = setup(0.0, "dense", precision="bf16")
    assert isinstance(active, DensePairs)
    assert not torch.allclose(active.h, h.relu(), rtol=1e-4)
    W = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codes = active.h.clone()
    expected = codes.bfloat16().double() @ W.bfloat16().double()
    assert torch.allclose(active.decode(active.h, W).x, expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))
    assert not torch.allclose(active.decode(active.h, W).x, codes @ W, rtol=1e-4)
    assert torch.allclose(active.h, h.relu(), atol=0.05)
    assert (active.mask != mask).double().mean() < 0.02


def test_many_pairs_are_a_table_and_few_a_list() -> None:
    assert isinstance(setup(0.0, None)[0], DensePairs)
    assert isinstance(setup(6.5, None)[0], SparsePairs)
