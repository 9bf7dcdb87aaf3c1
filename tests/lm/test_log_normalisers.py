"""Normalisers of next-token distributions against torch's own."""

from __future__ import annotations

import pytest
import torch

from trimtab.lm import token_statistics
from trimtab.lm.token_statistics import log_normalisers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalisers_are_logsumexp(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_statistics, "CPU_BLOCK", 100)  # several blocks
    logits = (30 * torch.randn(3, 7, 41, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[1, 2, 5:] = -torch.inf
    found = log_normalisers(logits)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(found.double(), logits.double().logsumexp(-1), rtol=1e-6)
    asked = logits.detach().clone().requires_grad_()
    log_normalisers(asked).sum().backward()
    assert asked.grad is not None
    assert torch.allclose(asked.grad.double(), logits.double().softmax(-1), atol=1e-2)
