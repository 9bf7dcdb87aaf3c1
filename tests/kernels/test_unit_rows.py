"""Gradients without their part along rows, and rows of norm 1, against float64; where training does both.

Mutations that must fail: the part along the row is added, or of another row; a square root is left out; the columns
behind the end count; a table's layout does not matter; a row of zeros becomes NaN, or NaN becomes a number.
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

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def module(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("unit_rows")


def drawn(d: int, device: str, *, turned: bool) -> tuple[Tensor, Tensor]:
    """Rows, one of zeros, and a gradient; row after row, or column after column."""
    W, G = torch.randn(2, 9, d, generator=torch.Generator().manual_seed(d)).to(device)
    W[3] = 0.0
    return (W.T.contiguous().T, G.T.contiguous().T) if turned else (W, G)


def without_along(G: Tensor, W: Tensor) -> Tensor:
    along = (G.double() * W.double()).sum(1, keepdim=True)
    return G.double() - along * W.double()


def of_norm_1(W: Tensor) -> Tensor:
    return W.double() / W.double().norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("d", [1, 6, 200])
def test_rows_keep_norm_1(module: ModuleType, d: int, turned: bool, device: str) -> None:
    W, G = drawn(d, device, turned=turned)
    expected = of_norm_1(W)
    module.divide_rows_by_norm(W)
    torch.testing.assert_close(W.double(), expected, rtol=1e-6, atol=1e-7)
    assert not W[3].any()
    expected = without_along(G, W)
    module.remove_along_rows(G, W)
    torch.testing.assert_close(G.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's
def test_what_is_not_finite_stays_so(module: ModuleType, device: str) -> None:
    W, G = drawn(6, device, turned=False)
    W[1, 2], G[0, 4] = math.nan, math.inf
    module.divide_rows_by_norm(W)
    module.remove_along_rows(G, W)
    assert W[1].isnan().all()
    assert torch.equal(W.isfinite().all(1), torch.arange(9, device=device) != 1)
    assert not G[:2].isfinite().any()


def test_nothing_is_done_to_no_rows(module: ModuleType, device: str) -> None:
    nothing = torch.zeros(0, 6, device=device)
    module.divide_rows_by_norm(nothing)
    module.remove_along_rows(nothing, nothing)


def test_a_training_keeps_its_decoder_by_kernels(
    found: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[tuple[Tensor, Tensor]] = []
    for devices in ({device}, set[str]()):
        monkeypatch.setattr(kernels, "DEVICES", devices)
        sae = TrainableTopK(TopKConfig(n_features=12, k=2), 5, seed=1).to(device)
        generator = torch.Generator().manual_seed(0)
        sae.W_dec.grad = torch.randn(12, 5, generator=generator).to(device)
        sae.W_dec.data.mul_(torch.rand(12, 1, generator=generator).to(device) + 0.5)
        sae.constrain()
        sae.project_gradients()
        ends.append((sae.W_dec.detach(), sae.W_dec.grad))
    assert found == ["divide_rows_by_norm", "remove_along_rows"]
    for mine, other in zip(*ends, strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(ends[0][0].norm(dim=1), torch.ones(12, device=device))


@pytest.mark.gpu
@CUDA
def test_rows_on_the_device_keep_norm_1(load: Callable[[str], ModuleType]) -> None:
    module = load("unit_rows")
    W, G = torch.randn(2, 16_384, 2304, device="cuda")
    expected = of_norm_1(W)
    module.divide_rows_by_norm(W)
    torch.testing.assert_close(W.double(), expected, rtol=1e-6, atol=1e-7)
    expected = without_along(G, W)
    module.remove_along_rows(G, W)
    torch.testing.assert_close(G.double(), expected, rtol=1e-5, atol=1e-6)
