"""What is known about a task stands in its class: no other room asks for its type or keeps lists of names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab
from trimtab.tasks import TASKS, Task
from trimtab.tasks.refusals import RefusalTask

ROOT = Path(trimtab.__file__).parent
PLACES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT / "tasks")


def faults(code: str) -> Iterator[str]:
    """Questions for a task's type, and names of tasks in a list or a comparison."""
    for node in ast.walk(ast.parse(code)):
        names = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and part.value in TASKS]
        if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Compare, ast.MatchValue)) and names:
            yield f"line {node.lineno} names {names[0]}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = ast.unparse(node.args[0]).lower().split(".")[-1]
            if asked == "task" or "Task" in ast.unparse(node.args[1]):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", PLACES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_room_knows_single_tasks(path: Path) -> None:
    assert not list(faults(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "code",
    ['HARMFUL = ("harmbench", "xstest")', 'INSTRUCTIONS = {"mmlu": ()}', 'task.name == "ioi"',
     "isinstance(setup.task, Refusals)", "isinstance(one, RefusalTask)"],
)  # fmt: skip
def test_the_check_can_fail(code: str) -> None:
    assert list(faults(code))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_says_what_prompting_tries_and_what_must_not_be_shown(task: type[Task]) -> None:
    assert len(task.instructions) >= 2
    assert task.instructions != Task.instructions
    assert task.hides_text == issubclass(task, RefusalTask)
