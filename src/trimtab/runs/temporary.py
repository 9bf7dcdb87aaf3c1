"""A directory for what needs one while it works, kept only if asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def kept_or_temporary(path: Path | str | None) -> Generator[Path]:
    """The given directory, or one that is gone at the block's end."""
    if path is not None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="trimtab-") as name:
        yield Path(name)
