"""Checkpoints: one safetensors file each, whole or absent, with everything that the next step needs.

Tensors hold the SAE, Adam's moments and the average of the weights, if any; the header's metadata holds the rest as
JSON. There is no random state: weights start from the config's seed, and batches follow from the source and the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.errors import UserError
from trimtab.runs import atomic_path

FORMAT = 1
KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A state of training after `step` steps."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """Everything that is not a tensor, such as the input scale."""


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and remove all but the last two. Raises a `UserError` if the disk refuses; earlier ones stay
    then."""
    path = directory / f"step-{checkpoint.step:09d}.safetensors"
    about = {"format": FORMAT, "step": checkpoint.step, **checkpoint.facts}
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata={"trimtab.checkpoint": json.dumps(about)})
    for old in checkpoint_files(directory)[:-KEPT]:
        old.unlink()
    return path


def latest_checkpoint(directory: Path) -> Checkpoint | None:
    """The last checkpoint, or None if there is none. Raises a `UserError` if it is damaged."""
    files = checkpoint_files(directory)
    if not files:
        return None
    path = files[-1]
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["trimtab.checkpoint"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if facts.pop("format") != FORMAT:
            raise KeyError("format")
        return Checkpoint(facts.pop("step"), tensors, facts)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"checkpoint {path}", "it is damaged or of another version", "delete it to go on from the one before"
        ) from error


def withdraw_checkpoint(directory: Path, step: int) -> int | None:
    """Remove the checkpoint of a step, as when the step after it failed; returns the step of the last that is left, if
    any."""
    (directory / f"step-{step:09d}.safetensors").unlink(missing_ok=True)
    left = checkpoint_files(directory)
    return int(left[-1].stem.removeprefix("step-")) if left else None


def discard_checkpoints(directory: Path) -> None:
    """Remove all checkpoints, as when what they were for is done."""
    for path in checkpoint_files(directory):
        path.unlink()


def checkpoint_files(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(directory.glob("step-*.safetensors"))
