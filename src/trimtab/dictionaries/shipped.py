"""The dictionaries that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from trimtab import runs

DEFAULT = "smollm2-135m-instruct/resid_post.15"
"""What the name "default" stands for: the dictionary of the default model."""
CONFIG = "cfg.json"


def shipped_names() -> list[str]:
    """Names of all dictionaries that ship with trimtab, as `load_dictionary` takes them: MODEL/SITE."""
    return runs.shipped_names(CONFIG)


def shipped_dictionary(name: str) -> Path | None:
    """Directory of a shipped dictionary, or None if none has that name."""
    return runs.shipped_directory(DEFAULT if name == "default" else name, CONFIG)
