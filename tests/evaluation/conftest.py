"""Puts this folder's modules, and those of the tasks' tests, on the path."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "tasks"):
    sys.path.insert(0, str(folder))
