"""A data directory of mild stand-ins, and the real one where there is one; puts this folder's modules on the path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from data_files import write_data


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests must not depend on the machine's data, except those that ask for them."""
    if "real_data" not in request.fixturenames:
        monkeypatch.delenv("TRIMTAB_DATA", raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every benchmark, small and whole, with mild stand-ins."""
    return write_data(tmp_path / "data")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The official files, where `TRIMTAB_DATA` says."""
    place = os.environ.get("TRIMTAB_DATA")
    if not place:
        pytest.skip("TRIMTAB_DATA does not name a directory with the benchmarks")
    return Path(place)
