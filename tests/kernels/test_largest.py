"""The k largest entries of rows against a stable sort, by itself and where training and inference take them.

Mutations that must fail: the last of equal entries are kept; NaN or −0 are ordered by their bits; what is behind the
end of a row counts; the search ends a bit too early; all that are equal to the k-th largest are kept; the second part
of a row forgets how many the first one kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from trimtab import kernels
from trimtab.dictionaries.architectures.topk import TopKConfig, TrainableTopK
from trimtab.dictionaries.sparse import keep_largest, largest

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def module(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("largest")


def expected(h: Tensor, k: int) -> Tensor:
    """Places of the k largest of every row, the first of equal ones, ascending."""
    return h.float().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values


def rows(n: int, dtype: torch.dtype, device: str) -> Tensor:
    """A row of different numbers, one of whole numbers, one of both zeros, one that is not finite."""
    h = torch.randn(4, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    h[1] = h[1].round()
    h[2] = torch.where(h[2] > 1, h[2], torch.where(h[2] > 0, 0.0, -0.0))
    h[3, : n // 2] = -math.inf
    h[3, n // 2 :: 3] = math.inf
    h[3, n // 2 :: 4] = -math.nan
    h[3, n // 2 :: 8] = math.nan
    return h.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (300, 300), (300, 299), (300, 17), (1100, 250)])
def test_the_largest_of_a_row_are_the_first_of_a_stable_sort(
    module: ModuleType, n: int, k: int, dtype: torch.dtype, device: str
) -> None:
    h = rows(n, dtype, device)
    values, places = module.largest_in_rows(h, k)
    right = expected(h, k)
    assert torch.equal(places, right)
    assert_same(values, h.gather(1, right))
    kept = torch.zeros_like(h).scatter_(1, right, h.gather(1, right).relu())
    before = h.clone()
    found = module.keep_largest_in_rows(h, k)
    assert found.data_ptr() == h.data_ptr()
    assert_same(found, kept)
    assert found[3].isnan().sum() == min(k, int(before[3].isnan().sum()))


def assert_same(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)


def test_operands_may_be_views_and_have_no_rows(module: ModuleType, device: str) -> None:
    h = rows(300, torch.float32, device)
    part = h[:, ::2]
    assert torch.equal(module.largest_in_rows(part, 20)[1], expected(part, 20))
    kept = module.keep_largest_in_rows(part, 20)
    assert torch.equal(kept[:2], torch.zeros_like(part).scatter_(1, expected(part, 20), 1.0)[:2] * part[:2])
    assert module.largest_in_rows(h[:0], 20)[0].shape == (0, 20)
    assert module.keep_largest_in_rows(h[:0], 20).shape == (0, 300)
    with pytest.raises(AssertionError, match="301 of 300"):
        module.largest_in_rows(h, 301)


def test_rows_that_are_too_wide_for_a_kernel_are_folded_for_one(
    found: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = rows(512, torch.float32, device)
    for widest, times in ((512, 1), (64, 2)):
        monkeypatch.setattr(kernels, "WIDEST", widest)
        found.clear()
        codes = largest(h, 8)
        assert found == ["largest_in_rows"] * times
        assert_same(codes.values.sort(1).values, h.sort(1).values[:, -8:])
        assert_same(codes.values, h.gather(1, codes.indices))
    found.clear()
    kept = keep_largest(h.clone(), 8)
    assert found == ["largest_in_rows"] * 2
    assert_same(kept[0], torch.where(h[0] >= h[0].sort().values[-8], h[0], 0.0))
    found.clear()
    assert torch.equal(keep_largest(h.clone(), 8, folded=False)[0], kept[0])
    assert not found  # neither does it fit nor is it folded


def trained(device: str) -> TrainableTopK:
    """An SAE half of whose features are dead."""
    sae = TrainableTopK(TopKConfig(n_features=48, k=4, k_aux=5, dead_after=10), 8, seed=1).to(device)
    sae.tokens_since_fired[::2] = 100
    sae.execution = "dense"
    return sae


def test_a_dense_step_of_a_topk_sae_is_the_same_by_kernels(
    found: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes and AuxK's; a NaN reaches the loss."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(device)
    steps: list[tuple[Tensor, ...]] = []
    for devices in ({device}, set[str]()):
        monkeypatch.setattr(kernels, "DEVICES", devices)
        sae = trained(device)
        loss = sae.gradients(x)
        assert float(loss.aux) > 0
        steps.append((loss.total, loss.codes, *(parameter.grad for parameter in sae.parameters())))  # pyright: ignore[reportArgumentType]
    assert found == ["keep_largest_in_rows"] * 2
    for mine, other in zip(*steps, strict=True):
        torch.testing.assert_close(mine, other)
    monkeypatch.setattr(kernels, "DEVICES", {device})
    x[2, 3] = math.nan
    assert trained(device).gradients(x).total.isnan()


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(16_384, 64), (16_000, 1152), (65_536, 64)])
def test_the_largest_on_the_device_are_torchs(n: int, k: int, dtype: torch.dtype) -> None:
    h = torch.randn(4096, n, device="cuda").to(dtype)
    right = h.topk(k, dim=1).values
    codes = largest(h, k)
    assert torch.equal(codes.values.sort(1, descending=True).values, right)
    assert torch.equal(h.gather(1, codes.indices), codes.values)
    assert torch.equal(codes.indices, largest(h, k).indices)
    kept = keep_largest(h.clone(), k)
    assert torch.equal(kept.topk(k, dim=1).values, right.relu())
    assert torch.equal(kept.count_nonzero(1), (right > 0).sum(1))
