"""The files that come with the package."""

from importlib.resources import files
from pathlib import Path

ASSETS = Path(str(files("trimtab"))) / "assets"
"""Where they lie."""


def shipped_names(file: str) -> list[str]:
    """Names, as MODEL/NAME, of the directories that ship and have a file in them."""
    return sorted(found.parent.name.replace("--", "/", 1) for found in ASSETS.glob(f"*/{file}"))


def shipped_directory(name: str, file: str) -> Path | None:
    """The directory of that name that ships and has a file in it, or None."""
    return ASSETS / name.replace("/", "--", 1) if name in shipped_names(file) else None
