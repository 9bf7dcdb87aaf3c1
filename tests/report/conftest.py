"""Runs that the report tests share."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "control"))
sys.path.insert(0, str(Path(__file__).parent))

from real_runs import Made, runner

from trimtab.lm import LanguageModel


@pytest.fixture(scope="session")
def made(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Run a command, once."""
    return runner(tiny_llama, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def whole(made: Callable[[str], Made]) -> Path:
    """The run of a policy that was trained, evaluated and analysed."""
    for name in ("policy", "evaluation", "analysis"):
        path = made(name).path
    return path


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("*.lock", "checkpoints")))
