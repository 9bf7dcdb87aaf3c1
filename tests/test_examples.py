"""The programs in examples/ run on a tiny model, and none takes more than ten statements."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import trimtab
from trimtab.lm import LanguageModel

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
MOST = 10


def statements(source: str) -> int:
    """Statements at any depth, the text at the top aside."""
    tree = ast.parse(source)
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - (ast.get_docstring(tree) is not None)


@pytest.fixture
def run(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs an example by its name with the tiny model in place of the default one; gives what it defined."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trimtab, "load_model", lambda name: tiny_llama, raising=False)
    return lambda name: runpy.run_path(str(EXAMPLES[0].parent / f"{name}.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_takes_at_most_ten_statements(example: Path) -> None:
    assert statements(example.read_text(encoding="utf-8")) <= MOST


def test_statements_are_counted_at_any_depth() -> None:
    assert statements('"""Text."""\nimport a\nfor b in a:\n    c = b; d = c\nwith a: e()\n') == 6


def test_every_example_has_a_test() -> None:
    tests = {name.removeprefix("test_") for name in globals()}
    assert {path.stem for path in EXAMPLES} <= tests


def test_the_page_shows_every_example_as_it_is() -> None:
    page = (EXAMPLES[0].parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert sorted(shown) == sorted(path.read_text(encoding="utf-8").partition('"""\n\n')[2] for path in EXAMPLES)


def test_steer_with_a_vector(run: Any) -> None:
    result = run("steer_with_a_vector")["result"]
    assert result.steered[0].realised.relative == pytest.approx(0.4, abs=1e-4)
    assert result.unsteered.realised.n_edits == 0
    assert result.steered[0].continuations[0].text != result.unsteered.continuations[0].text
    assert result.trace.edits.num_rows == result.steered[0].realised.n_edits


def test_generate_with_a_vector(run: Any, tiny_llama: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    made = run("generate_with_a_vector")
    unsteered = tiny_llama.hf.generate(**made["inputs"], max_new_tokens=20)
    assert made["tokens"].tolist() != unsteered.tolist()
    assert "Yesterday I went to the" in capsys.readouterr().out
