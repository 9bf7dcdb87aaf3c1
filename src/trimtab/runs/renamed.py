"""Fields of commands' configs that once had another name: `run.json` is read by it, as an option it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED: dict[str, dict[str, str]] = {
    "harvest": {"out": "run", "sites": "site", "batch": "batch_size"},
    "train": {"sequences_per_pass": "model_batch_size"},
    "rank": {"features": "feature", "alpha": "dose"},
    "policy headroom": {"masks": "mask", "features": "n_candidates", "out": "run"},
    "policy train": {"repeats": "samples"},
    "policy evaluate": {"controls": "control", "sample": "n_random", "out": "run", "run": "policy"},
    "policy analyze": {"parts": "part"},
    "demo": {"doses": "dose", "sizes": "size", "replicates": "samples", "candidates": "n_candidates"},
}
"""New names by old ones, by command."""


def with_new_names(command: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it was recorded, under the names that its fields have now."""
    renamed = {old: new for old, new in RENAMED.get(command, {}).items() if new not in config}
    return {renamed.get(name, name): value for name, value in config.items()}


def new_name(command: str, name: str) -> str | None:
    """What a field of a command's config is called now, if the name is an old one of it."""
    return RENAMED.get(command, {}).get(name)
