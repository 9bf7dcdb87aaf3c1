"""A model and a dictionary with a planted readout."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from planted_fixtures import planted, planted_dictionary  # noqa: F401
