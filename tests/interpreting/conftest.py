"""Puts this folder's modules and the stub of an endpoint on the path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "judges"))
sys.path.insert(0, str(Path(__file__).parents[1] / "steering"))

from planted_passages import axbench_files
from stub_endpoint import StubEndpoint, served


@pytest.fixture
def axbench(tmp_path: Path) -> Path:
    """A directory of files in AxBench's layout, of three concepts that are a word each."""
    return axbench_files(tmp_path / "axbench")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def endpoint() -> Iterator[StubEndpoint]:
    pytest.importorskip("openai")
    with served() as server:
        yield server


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
