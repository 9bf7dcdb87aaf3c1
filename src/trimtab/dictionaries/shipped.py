"""The dictionaries that come with the package, by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

DEFAULT = "smollm2-135m-instruct/resid_post.15"
"""What the name "default" stands for: the dictionary of the default model."""


def shipped_names() -> list[str]:
    """Names of all dictionaries that ship with trimtab, as `load_dictionary` takes them: MODEL/SITE."""
    return sorted(config.parent.name.replace("--", "/", 1) for config in _assets().glob("*/cfg.json"))


def shipped_dictionary(name: str) -> Path | None:
    """Directory of a shipped dictionary, or None if none has that name."""
    name = DEFAULT if name == "default" else name
    return _assets() / name.replace("/", "--", 1) if name in shipped_names() else None


def _assets() -> Path:
    return Path(str(files("trimtab"))) / "assets"
