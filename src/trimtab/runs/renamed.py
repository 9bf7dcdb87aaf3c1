"""Fields of commands' configs that once had another name: `run.json` is read by it, as an option it is refused; and
options that went elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

RENAMED: dict[str, dict[str, str]] = {
    "harvest": {"out": "run", "sites": "site", "batch": "batch_size"},
    "train": {"sequences_per_pass": "model_batch_size", "encoder_dtype": "precision"},
    "evaluate ground-truth": {"encoder_dtype": "precision"},
    "rank": {"features": "feature", "alpha": "dose", "k": "confidence_k"},
    "policy headroom": {"masks": "mask", "features": "n_candidates", "out": "run"},
    "policy train": {"repeats": "samples", "ppo.learning_rate": "ppo.lr"},
    "policy evaluate": {"controls": "control", "sample": "n_random", "out": "run", "run": "policy"},
    "policy analyze": {"parts": "part"},
}
"""New names by old ones, by command; those of a part's fields behind the part's name."""


DEFAULT = object()
"""A value that is left out, as the new field's default is."""
NEW_VALUES: dict[str, dict[Any, Any]] = {"precision": {None: DEFAULT, "float32": "fp32", "bfloat16": "bf16"}}
"""New values by old ones, of renamed fields whose values have other names, too."""
COMMANDS_NOW: dict[str, dict[str, str]] = {"evaluate core": {"write_stats": "trimtab sae stats"}}
"""Commands that do what options once did, by command and old option."""


def with_new_names(command: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it was recorded, under the names that its fields have now."""
    return _renamed(config, RENAMED.get(command, {}), "")


def _renamed(config: Mapping[str, Any], names: Mapping[str, str], within: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        new = names.get(within + name, "").removeprefix(within)
        key = new if new and new not in config else name
        if key == new and key in NEW_VALUES:
            value = NEW_VALUES[key].get(value, value)
        if isinstance(value, Mapping):
            value = _renamed(cast("Mapping[str, Any]", value), names, f"{within}{name}.")
        if value is not DEFAULT:
            found[key] = value
    return found


def new_name(command: str, name: str) -> str | None:
    """What a field of a command's config is called now, if the name is an old one of it."""
    return RENAMED.get(command, {}).get(name)


def command_now(command: str, name: str) -> str | None:
    """The command that does what an old option of a command did, if the name is of one."""
    return COMMANDS_NOW.get(command, {}).get(name)
