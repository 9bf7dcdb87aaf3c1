"""Kernels on a CUDA device where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from trimtab import kernels

Load = Callable[[str], ModuleType]


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def load(device: str) -> Load:
    """Imports a module of kernels."""
    pytest.importorskip("triton")
    if device == "cpu":
        assert os.environ["TRITON_INTERPRET"] == "1"
    return lambda name: importlib.import_module(f"trimtab.kernels.{name}")


@pytest.fixture
def found(load: Load, device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels are found here, too; the names of those that were looked up."""
    monkeypatch.setattr(kernels, "DEVICES", {device})
    names: list[str] = []
    real = kernels._kernel

    def noted(name: str) -> Callable[..., object] | None:
        names.append(name)
        return real(name)

    monkeypatch.setattr(kernels, "_kernel", noted)
    return names
