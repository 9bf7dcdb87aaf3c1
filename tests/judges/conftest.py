"""A stub of a chat endpoint; puts this folder's modules on the path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stub_endpoint import StubEndpoint, served


@pytest.fixture
def endpoint() -> Iterator[StubEndpoint]:
    pytest.importorskip("openai")
    with served() as server:
        yield server


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
