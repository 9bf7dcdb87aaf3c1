"""Activations on disk by their hash: what replaced others while a run decoded, kept so that it can be replayed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.errors import UserError
from trimtab.runs import atomic_path

_HASHES = ".hashes"


def hex_of_hash(key: int) -> str:
    """An `activation_hash` as 16 hexadecimal digits."""
    return f"{key & (1 << 64) - 1:016x}"


def hash_from_hex(text: str) -> int:
    """The inverse of `hex_of_hash`."""
    return int.from_bytes(bytes.fromhex(text), "big", signed=True)


def write_activations(path: Path, activations: Mapping[int, Tensor]) -> None:
    """Write activations into one safetensors file: those of one width and precision make one tensor `[M, d]`.

    Raises:
        UserError: the disk refuses; nothing is left half-written.
    """
    groups: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, row in activations.items():
        groups[f"{str(row.dtype).removeprefix('torch.')}.{len(row)}"][key] = row
    tensors = {name: torch.stack(list(rows.values())) for name, rows in groups.items()}
    tensors |= {name + _HASHES: torch.tensor(list(rows)) for name, rows in groups.items()}
    with atomic_path(path) as partial:
        save_file(tensors, partial)


def read_activations(path: Path) -> dict[int, Tensor]:
    """The inverse of `write_activations`; none if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        tensors = load_file(path)
        pairs = [(tensors[name + _HASHES], rows) for name, rows in tensors.items() if not name.endswith(_HASHES)]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(str(path), f"not readable ({error})".splitlines()[0], "run it again") from error
    return {key: row for keys, rows in pairs for key, row in zip(keys.tolist(), rows, strict=True)}
