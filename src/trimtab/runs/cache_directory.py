"""Where what can be had again is kept between commands: fetched models, digests of files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$TRIMTAB_CACHE`, else `trimtab` in `$XDG_CACHE_HOME`, else `~/.cache/trimtab`."""
    if chosen := os.environ.get("TRIMTAB_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
