"""Which weights a model has, whatever precision they are loaded in: a hash per precision.

`LanguageModel.fingerprint` names a model as it is loaded. What is saved for a model (flags, a steering) must know it
again in another precision, and so keeps the hash of its weights rounded to each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
"""Those in which a saved model may be loaded again; its weights are rounded then, and their hash is another."""
SAMPLE = 4096
"""Values of each weight that the hash is over, evenly spaced."""


def weight_hash(weights: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and a fixed sample of the values of weights, rounded to a precision (16 characters).

    Args:
        weights: by name, as `state_dict` gives them.
        dtype: the precision.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // SAMPLE)]
        values = values.to(dtype).float() if values.is_floating_point() else values
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def weight_hashes(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The hash for each precision, by its name."""
    return {precision_name(dtype): weight_hash(weights, dtype) for dtype in PRECISIONS}


def precision_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
