"""Lets tests and the script that they kill import `planted_rows` from this directory."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
