"""What importing costs, which room may import which, and that no modules import one another."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent
HEAVY = ("torch", "transformers", "scipy.stats")
WITHOUT_TORCH = ["trimtab", "trimtab.errors", "trimtab.stats", "trimtab.runs", "trimtab.report", "trimtab.cli"]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_leaves_torch_unloaded(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"there is no {module}")
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_takes_under_half_a_second() -> None:
    """Processor time, since other work on the machine stretches the clock; best of three."""
    if importlib.util.find_spec("trimtab.cli") is None:
        pytest.skip("there is no command line")
    assert min(_processor_seconds([str(SCRIPTS / "trimtab"), "--help"]) for _ in range(3)) < 0.5


def test_rooms_import_only_rooms_below_them() -> None:
    done = _lint_imports(ROOT, ROOT / "src")
    assert done.returncode == 0, done.stdout + done.stderr


ROOMS = ["errors", "stats", "runs", "lm", "steering", "report", "cli"]
RULES = [
    "A room imports only rooms below it",
    "report imports only runs",
    "The rooms without models never import torch",
    "No modules import one another in a circle",
]


@pytest.mark.parametrize(
    ("importer", "imported", "broken"),
    [
        ("cli", "trimtab.report", []),
        ("report", "trimtab.stats", []),
        ("steering", "trimtab.lm", []),
        ("lm", "trimtab.steering", [0]),
        ("stats", "trimtab.runs", [0, 1]),
        ("report", "trimtab.lm", [1]),
        ("steering", "trimtab.report", [0]),
        ("runs", "torch", [2]),
        ("report.page", "torch", [2]),
        ("newroom", "trimtab.errors", [0]),
        ("lm.circle", "trimtab.lm.back", [3]),
    ],
)
def test_the_import_rule_sees_what_breaks_it(tmp_path: Path, importer: str, imported: str, broken: list[int]) -> None:
    """The rules of pyproject.toml on a package of almost empty rooms with one import more."""
    package = tmp_path / "src" / "trimtab"
    for room in ROOMS:
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "lm" / "back.py").write_text("if TYPE_CHECKING:\n    import trimtab.lm.circle\n")
    (package / "lm" / "circle.py").touch()
    *parents, last = importer.split(".")
    package.joinpath(*parents, f"{last}.py" if parents or last not in ROOMS else f"{last}/__init__.py").write_text(
        f"import {imported}\n"
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = _lint_imports(tmp_path, tmp_path / "src")
    assert done.returncode == (1 if broken else 0), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for i, rule in enumerate(RULES):
        verdict = "BROKEN" if i in broken else "KEPT"
        assert [line for line in lines if line.startswith(rule) and line.endswith(verdict)], done.stdout


def _lint_imports(folder: Path, source: Path) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPTS / "lint-imports"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(source), "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _processor_seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, capture_output=True, check=True)
    after = os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system)
