"""The examples of docs/tasks.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.tasks import TASKS, Task

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)


def test_the_first_example(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(examples()[0].replace('"DIRECTORY"', repr(str(data))), {})
    assert re.fullmatch(r"\d\.\d accuracy\n", capsys.readouterr().out)


def test_a_task_of_one_s_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("trimtab.tasks.registry.TASKS", dict(TASKS))
    names: dict[str, object] = {}
    exec(examples()[1], names)
    task = names["task"]
    assert isinstance(task, Task)
    assert len(task.items("all")) == 25
    sevens = [item.answer == "7" for item in task.items("test")]
    assert f"'accuracy': {sum(sevens) / len(sevens)}" in capsys.readouterr().out


def test_every_task_is_described() -> None:
    page = PAGE.read_text("utf-8")
    for name, task in TASKS.items():
        assert f"`{name}`" in page
        assert f"`{task.metric}`" in page
