"""The accelerator's kernels against float64 sums written out; on the CPU in Triton's interpreter, if there is one."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from trimtab.dictionaries.active import SparsePairs
from trimtab.dictionaries.sparse import ActivePairs, collect_rows, decode_pairs, dot_pairs, order_by_feature
from trimtab.kernels import kernel_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 40


@pytest.fixture(scope="module")
def bags(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("bags")


def drawn(d: int, dtype: torch.dtype, counts: list[int]) -> tuple[ActivePairs, Tensor, Tensor]:
    """Pairs with these numbers per row, X [B, d] and W [n, d]."""
    generator = torch.Generator().manual_seed(d)
    feature = torch.cat([torch.randperm(N, generator=generator)[:count].sort().values for count in counts])
    start = torch.tensor([0, *counts]).cumsum(0)
    value = torch.randn(len(feature), generator=generator)
    X, W = (torch.randn(rows, d, generator=generator).to(dtype) for rows in (len(counts), N))
    return ActivePairs(value.to(DEVICE), feature.to(DEVICE), start.to(DEVICE)), X.to(DEVICE), W.to(DEVICE)


def dense(pairs: ActivePairs) -> Tensor:
    table = torch.zeros(len(pairs.start) - 1, N, dtype=torch.float64, device=DEVICE)
    table[pairs.row, pairs.feature] = pairs.value.double()
    return table


def close(ours: Tensor, expected: Tensor) -> bool:
    """To the rounding of the result's dtype, since sums are in float32. Triton's interpreter rounds towards zero."""
    tolerance = 1e-5 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps
    return bool(((ours.double() - expected).abs() <= tolerance * (1 + expected.abs())).all())


COUNTS = [3, 0, 17, 16, 40, 1, 0, 33, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1, 6, 128, 200])
def test_bags_by_row_and_by_feature_and_their_dots(bags: ModuleType, d: int, dtype: torch.dtype) -> None:
    pairs, X, W = drawn(d, dtype, COUNTS)
    codes = dense(pairs)
    decoded = bags.weighted_bags(pairs.feature, pairs.value, pairs.start, W)
    assert decoded.dtype == dtype
    assert close(decoded, codes @ W.double())
    assert not decoded[1].any()
    order = order_by_feature(pairs, N)
    collected = bags.weighted_bags(order.row, pairs.value[order.pair], order.start, X)
    assert close(collected, codes.T @ X.double())
    dots = bags.bag_dots(pairs.feature, pairs.start, X, W)
    assert dots.dtype == dtype
    assert close(dots, (X.double() @ W.double().T)[pairs.row, pairs.feature])


def test_no_pairs_and_no_rows(bags: ModuleType) -> None:
    pairs, X, W = drawn(6, torch.float32, [0, 0])
    assert not bags.weighted_bags(pairs.feature, pairs.value, pairs.start, W).any()
    assert bags.bag_dots(pairs.feature, pairs.start, X, W).shape == (0,)
    nothing = torch.zeros(1, dtype=torch.long, device=DEVICE)
    assert bags.weighted_bags(pairs.feature, pairs.value, nothing, W).shape == (0, 6)


def test_operands_may_be_views(bags: ModuleType) -> None:
    pairs, X, W = drawn(12, torch.float32, COUNTS)
    expected = dense(pairs) @ W[:, ::2].double()
    assert close(bags.weighted_bags(pairs.feature, pairs.value, pairs.start, W[:, ::2]), expected)
    dots = bags.bag_dots(pairs.feature, pairs.start, X[:, 1::2], W[:, ::2])
    assert close(dots, (X[:, 1::2].double() @ W[:, ::2].double().T)[pairs.row, pairs.feature])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu" or find_spec("triton") is None, reason="needs a CUDA device and Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_products_on_the_device_equal_those_on_the_cpu(dtype: torch.dtype) -> None:
    pairs, X, W = drawn(200, dtype, COUNTS)
    assert kernel_for("weighted_bags", pairs.value, W) is not None
    codes = dense(pairs)
    assert close(decode_pairs(pairs, W), codes @ W.double())
    assert close(dot_pairs(pairs, X, W), (X.double() @ W.double().T)[pairs.row, pairs.feature])
    assert close(collect_rows(order_by_feature(pairs, N), pairs.value, X), codes.T @ X.double())
    assert close(SparsePairs(pairs, N).by_feature(pairs.value), codes.sum(0))
    pairs.value.requires_grad_()
    assert kernel_for("weighted_bags", pairs.value, W) is None  # torch's operation is differentiable
