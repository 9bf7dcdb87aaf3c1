"""A directory in SAELens's layout: `cfg.json` beside `sae_weights.safetensors`, and the weights' checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.dictionaries.reading import (
    GET_AGAIN,
    PICKLES,
    FoundSAE,
    Stated,
    check_tensors,
    pickle_error,
    read_json,
    read_safetensors,
)
from trimtab.dictionaries.sae import check_shapes
from trimtab.dictionaries.saelens_config import parse_config
from trimtab.errors import UserError

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
DIGEST = "trimtab.sha256"
"""Where a weights file that trimtab wrote keeps its checksum, in the header."""


def read_saelens(path: Path) -> FoundSAE:
    """Read a directory that SAELens or trimtab saved. Raises a `UserError` that names file and field or tensor."""
    cfg = read_json(path / CONFIG_FILE)
    parse_config(cfg, str(path / CONFIG_FILE))
    weights = path / WEIGHTS_FILE
    if not weights.exists():
        pickle = next((file for file in sorted(path.iterdir()) if file.suffix in PICKLES), None)
        if pickle:
            raise pickle_error(pickle)
    stored = read_safetensors(weights)
    saved_with = stored.metadata.get(DIGEST)
    if saved_with is not None and saved_with != digest(stored.tensors):
        raise UserError(str(weights), "its values do not match the checksum they were saved with", GET_AGAIN)
    return found_in_saelens(cfg, stored.tensors, str(path / CONFIG_FILE), str(weights))


def found_in_saelens(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], config: str, weights: str) -> FoundSAE:
    """Understand a config and tensors of SAELens, wherever they come from; what they are called is for messages."""
    parsed = parse_config(cfg, config)
    tensors = dict(tensors)
    scaling = tensors.pop("scaling_factor", None)  # SAELens before 6 wrote ones that it never used
    if scaling is not None and not bool((scaling == 1).all()):
        raise UserError(
            f"tensor scaling_factor in {weights}", "trimtab reads SAEs without one", "use another dictionary"
        )
    shapes = parsed.architecture.shapes
    stated = Stated("architecture", parsed.architecture.architecture, CONFIG_FILE)
    check_tensors(tensors, weights, stated, needed=shapes)
    check_shapes(shapes, tensors, n=parsed.d_sae, d=parsed.d_in, source=weights)
    return FoundSAE(parsed.architecture, tensors, parsed.settings, parsed.info)


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    result = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        result.update(f"{name} {weight.dtype} {list(weight.shape)};".encode())
        result.update(weight.contiguous().view(torch.uint8).numpy().data)
    return result.hexdigest()
