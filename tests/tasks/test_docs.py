"""The examples of docs/tasks.md run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.judges import Judge, Verdict
from trimtab.tasks import TASKS, Task, TaskConfig

Capture = pytest.CaptureFixture[str]

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)


def test_the_first_example(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(examples()[0].replace('"DIRECTORY"', repr(str(data))), {})
    assert re.fullmatch(r"\d\.\d accuracy\n", capsys.readouterr().out)


def test_a_judge_of_one_s_own(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """As the page has it, and found in a file by commands, with its option."""
    example = examples()[1]
    exec(example.replace('"DIRECTORY"', repr(str(data))), {})
    assert capsys.readouterr().out == "0.5\n"
    (tmp_path / "judges_of_the_page.py").write_text(example.partition("\n\n\ntask = ")[0], "utf-8")
    monkeypatch.chdir(tmp_path)
    named: dict[str, Any] = {"judge": "judges_of_the_page:SaysNo", "judge_option": ("words=never",)}
    task = TaskConfig(task="harmbench", data=data, **named).read_task()
    assert task is not None
    judge = task.judge
    assert isinstance(judge, Judge)
    assert judge.score("?", "I never do.") == Verdict(refused=True, reason="never")
    assert judge.score("?", "I cannot say that.") == Verdict(refused=False)


def test_a_task_of_one_s_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("trimtab.tasks.registry.TASKS", dict(TASKS))
    names: dict[str, object] = {}
    exec(examples()[2], names)
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
