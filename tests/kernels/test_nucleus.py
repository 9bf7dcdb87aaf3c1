"""The kernel that finds the floor of a nucleus gives the very floor that torch's operations give.

Mutations that must fail: sums in float32; a part of a row left out; the floor's own tokens not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from trimtab import kernels
from trimtab.lm.sampling import UNIT, choose_token, nucleus_floor

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def rows(size: int) -> Tensor:
    """Nearly flat, steep, all on one token, and alike but for one."""
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(size)) * torch.tensor([[0.01], [4], [0], [0]])
    logits[2, size // 2], logits[3, -1] = 200.0, 1.0
    return torch.softmax(logits, dim=-1)


@pytest.mark.parametrize("size", [5, 300])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 1 - 1e-9])
def test_the_floor_is_that_of_torchs_operations(
    load: Callable[[str], ModuleType], size: int, top_p: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, probs = load("nucleus"), rows(size).to(device)
    monkeypatch.setattr(module, "COLUMNS_AT_ONCE", 128)
    floor = module.nucleus_floor(probs, math.ceil(top_p * UNIT), UNIT)
    monkeypatch.setattr(kernels, "DEVICES", set[str]())
    assert torch.equal(floor, nucleus_floor(probs, top_p))
    assert torch.equal(floor, module.nucleus_floor(probs.T.contiguous().T, math.ceil(top_p * UNIT), UNIT))


def test_sampling_asks_for_the_kernel(found: list[str], device: str) -> None:
    logits, u = torch.zeros(1, 4, device=device), torch.tensor([0.6], dtype=torch.float64, device=device)
    logits[0, 2] = 3.0
    assert choose_token(logits, 1.0, 0.5, u, None).tolist() == [2]
    assert found == ["nucleus_floor"]
    assert nucleus_floor(torch.zeros(0, 4, device=device), 0.5).shape == (0, 1)


@pytest.mark.gpu
@CUDA
def test_the_floor_on_the_device_is_that_on_the_cpu() -> None:
    probs = torch.softmax(3 * torch.randn(64, 256_000, device="cuda"), dim=-1)
    for top_p in (0.1, 0.9, 0.9999):
        assert torch.equal(nucleus_floor(probs, top_p).cpu(), nucleus_floor(probs.cpu(), top_p))
