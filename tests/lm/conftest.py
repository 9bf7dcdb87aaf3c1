"""Puts this folder's own modules on the path; a cache of their own for tests that fetch or look up models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache, no agreed terms, and no hub."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    for name in ("TRIMTAB_ACCEPT_TERMS", "TRIMTAB_STORIES", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"
