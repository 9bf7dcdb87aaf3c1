"""Vectors in `.pt` and `.safetensors` files: what steering-vectors takes, and what people save themselves.

steering-vectors (0.12) has no file of its own: its `SteeringVector` is a dataclass of `layer_activations`, tensors
`[d]` by layer counted from 0, and a `layer_type`. Written are its arguments, so that nothing need be unpickled:

    SteeringVector(**torch.load("sea.pt"))

Read are the same, a whole `SteeringVector` that was pickled (into a stand-in: only tensors and plain values are
loaded), tensors by layer or by site, and a single vector whose site is told.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.dictionaries.checked_weights import damage_named, read_safetensors
from trimtab.errors import UserError
from trimtab.lm import Site
from trimtab.runs import atomic_path
from trimtab.steering.exchange.layer_vectors import AddedVectors

BLOCK = "decoder_block"
"""What steering-vectors calls the output of a whole layer."""


class _SteeringVector:
    """Stands in for steering-vectors' class while a file is read."""

    layer_activations: Mapping[int, Tensor]
    layer_type: str


_THEIRS = "steering_vectors.steering_vector.SteeringVector"


def write(vectors: AddedVectors, path: Path, about: str) -> None:
    """Write the arguments of steering-vectors' `SteeringVector`."""
    del about
    layers = {layer: row.float().contiguous() for layer, row in sorted(vectors.layers.items())}
    with atomic_path(path) as partial:
        torch.save({"layer_activations": layers, "layer_type": BLOCK}, partial)


def read(path: Path, site: str | None = None) -> AddedVectors:
    """Read vectors.

    Args:
        path: the file.
        site: where a single vector steers.

    Raises:
        UserError: it is damaged, would have to be unpickled, or it cannot be told which vector is for which layer.
    """
    if path.suffix == ".safetensors":
        found: Any = read_safetensors(path, "vector")[0]
    else:
        found = _load(path)
    if isinstance(found, _SteeringVector):
        found = vars(found)
    if isinstance(found, Mapping) and "layer_activations" in found:
        kind = found.get("layer_type", BLOCK)
        if kind != BLOCK:
            why = f"only vectors for {BLOCK}, the outputs of layers, are read"
            raise UserError(f"layer_type {kind!r} in {path}", why, "make it for whole layers")
        found = found["layer_activations"]
    if isinstance(found, Mapping) and len(found) == 1 and site is not None:
        (found,) = found.values()
    if isinstance(found, Tensor):
        if site is None:
            raise UserError(str(path), "it does not say where its vector is for", "give the site: --site resid_post.15")
        found = {site: found}
    if not isinstance(found, Mapping):
        raise UserError(
            str(path), f"it holds a {type(found).__name__}, no vectors", "save one tensor, or one per layer"
        )
    if site is not None and len(found) > 1:
        raise UserError(f"--site {site}", f"{path} holds {len(found)} vectors by name", "leave it out")
    return AddedVectors(layers={_layer(name, path): _row(name, value, path) for name, value in found.items()})


def _load(path: Path) -> Any:
    with damage_named(path, "torch", RuntimeError, EOFError, KeyError, what="vector"):
        try:
            with torch.serialization.safe_globals([(_SteeringVector, _THEIRS)]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                str(path),
                "it holds more than tensors and would have to be unpickled, which can run any code; trimtab does not",
                "where you trust it, save its tensors alone: torch.save({15: vector}, 'vector.pt')",
            ) from error


def _layer(name: object, path: Path) -> int:
    """The layer that a vector is for, by its name: 15, "15", "direction.15", "resid_post.15"."""
    match = re.fullmatch(r"(?:direction\.|layer[._])?(\d+)", str(name))
    if match:
        return int(match[1])
    try:
        site = Site.parse(str(name))
    except UserError as error:
        why = "vectors are named by layer (15) or by site (resid_post.15)"
        raise UserError(f"vector {name!r} in {path}", why, error.hint) from None
    if site.kind != "resid_post":
        raise UserError(f"vector {name!r} in {path}", "only vectors for resid_post are read", "give others by Python")
    return site.layer


def _row(name: object, value: Any, path: Path) -> Tensor:
    """One vector, of a tensor that holds no other."""
    what = f"vector {name} in {path}"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UserError(what, "it is no tensor of floating-point numbers", "save tensors")
    if value.ndim == 0 or value.numel() != value.shape[-1]:
        raise UserError(
            f"{what} of shape {'×'.join(map(str, value.shape)) or '()'}", "it is not one vector", "give [d]"
        )
    return value.detach().float().flatten()
