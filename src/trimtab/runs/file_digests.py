"""Digests of files by all of their bytes, kept so that a file that has not changed is read once.

A large file costs its reading once. Its digest is then kept in the cache directory together with the
file's size, number and times of change; the time of the last change of its entry (ctime) is one of them, which neither
`touch` nor a copy that keeps times can set back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, cast

from trimtab.errors import UserError
from trimtab.runs.atomic import write_json
from trimtab.runs.cache_directory import cache_dir
from trimtab.runs.progress import Meter

_KEPT_ABOVE = 1 << 20
"""Smaller files are read as fast as what would be kept of them."""
_RECENT_NS = 2 * 10**9
"""What changed so shortly ago may change again within the clock's tick, unseen; its digest is not kept."""
_BLOCK = 1 << 22


def file_state(path: Path) -> list[int]:
    """What changes whenever the file does: size, number, times of change. Raises an `OSError` if it is not there."""
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def file_digest(path: Path, meter: Meter | None = None) -> str:
    """SHA-256 of a file's bytes (64 hex characters).

    Args:
        path: absolute.
        meter: told of the megabytes that are done.

    Raises:
        OSError: the file cannot be read.
    """
    state = file_state(path)
    kept = cache_dir() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    if state[0] > _KEPT_ABOVE and (known := _read(kept)) and known.get("state") == state:
        return str(known["sha256"])
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if meter is not None:
                meter.advance(len(block) / 1e6)
    settled = file_state(path) == state and time.time_ns() - max(state[2:]) > _RECENT_NS
    if state[0] > _KEPT_ABOVE and settled:
        with contextlib.suppress(UserError, OSError):  # a cache that cannot be written is none
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"path": str(path), "state": state, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def _read(kept: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}
