"""No code that only tests use: what `src` defines is used in it, by a benchmark, recipe, example, or in docs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("src", "benchmarks", "recipes", "examples", "docs")
CALLED_BY_OTHERS = {"_render_traceback_", "get_mask_sizes", "get_max_length", "get_seq_length"}


def defined(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes and methods, and of a module's constants; not of what a decorator takes up, as in
    `@register` or `@operation()`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            takes_up = [d for d in node.decorator_list if isinstance(d, ast.Call) or "register" in ast.unparse(d)]
            yield from () if takes_up else (node.name,)
        if isinstance(node, ast.Assign) and isinstance(tree, ast.Module):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        if isinstance(node, ast.ClassDef) and "register" not in map(ast.unparse, node.decorator_list):
            yield node.name
        if isinstance(node, ast.ClassDef | ast.If):
            yield from defined(node)


def known_to_their_base(trees: Iterable[ast.AST]) -> set[str]:
    """Classes that derive from one that takes up its subclasses."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = {c.name for c in classes for part in c.body if getattr(part, "name", "") == "__init_subclass__"}
    for _ in range(5):  # generations
        found |= {c.name for c in classes for base in c.bases if isinstance(base, ast.Name) and base.id in found}
    return found


def used(tree: ast.AST) -> Iterator[str]:
    """Names that are read and attributes that are asked for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def unused(root: Path) -> set[str]:
    code = [file for part in PARTS for file in root.glob(f"{part}/**/*.py")]
    trees = {file: ast.parse(file.read_text()) for file in code}
    texts = [*root.glob("docs/**/*.md"), *root.glob("*.md"), *root.glob("recipes/**/*.md")]
    words = {word for file in texts for word in re.findall(r"\w+", file.read_text())}
    names = {name for file, tree in trees.items() if "src" in file.relative_to(root).parts for name in defined(tree)}
    names = {name for name in names if not name.startswith("__")}
    taken = {name for tree in trees.values() for name in used(tree)} | known_to_their_base(trees.values())
    return names - words - taken


def test_src_defines_nothing_that_only_tests_use() -> None:
    assert unused(ROOT) - CALLED_BY_OTHERS == set()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("def made(): ...\n", {"made"}),
        ("class Made:\n    def method(self): ...\nMade()\n", {"method"}),
        ("LIMIT = 3\n", {"LIMIT"}),
        ("def made(): ...\nmade()\n", set()),
        ("def told_of(): ...\n", set()),
        ("@operation()\ndef made(): ...\n", set()),
        ("class A:\n    def __init_subclass__(cls): ...\nclass B(A): ...\nclass C(B): ...\n", set()),
    ],
)
def test_the_check_sees_what_nothing_uses(tmp_path: Path, code: str, found: set[str]) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/module.py").write_text(code)
    (tmp_path / "README.md").write_text("`told_of()` does it.")
    assert unused(tmp_path) == found
