"""Tensors on their way to a device, which nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. To a card it goes from pinned memory, so that Python goes on while the card works on what
    it was asked for before."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
