"""What a run was made with: versions, machine, time, hashes of files. Imports none of what it names."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from trimtab import version

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "pyarrow")
"""Packages whose versions a run records, besides python and trimtab."""


def versions() -> dict[str, str]:
    """Versions of python, trimtab and `PACKAGES`; a package that is not installed is left out."""
    found = {"python": platform.python_version(), "trimtab": version.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Operating system, processor architecture, and the number of CPUs that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"system": platform.system(), "release": platform.release(), "machine": platform.machine(), "cpus": cpus}


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes (64 hex characters)."""
    with open(Path(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def utc_now() -> str:
    """The time as `2026-01-31T12:34:56Z`."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
