"""From the words of a config to what its task is loaded with: options of the loader and the judge of the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from trimtab.errors import UserError
from trimtab.judges import ClassifierJudge, Judge, judge_options, make_judge
from trimtab.runs import option_name, read_options
from trimtab.tasks import Task, find_task, load_options

REWARDED_BY = ("task", "task_option", "judge", "judge_option")
"""Fields of a config that say what is rewarded: rewards under different ones cannot be compared."""
TASK_FIELDS = (*REWARDED_BY, "data")
"""Fields of a config by which its task is loaded."""


class NamesTask(Protocol):
    """A config that names a task."""

    @property
    def task(self) -> str: ...
    @property
    def data(self) -> Path | None: ...
    @property
    def task_option(self) -> tuple[str, ...]: ...
    @property
    def judge(self) -> str | None: ...
    @property
    def judge_option(self) -> tuple[str, ...]: ...
    @property
    def transcript(self) -> Path | None:
        """File that keeps the replies of a judge behind an endpoint."""
        ...


def task_options(config: NamesTask) -> dict[str, Any]:
    """What `load_task` and `read_task` take beside name, data and tokenizer.

    Raises:
        UserError: an option that the task or the judge does not take, a value of another type, a judge that is not
            there or cannot be loaded, or a judge for a task whose answers none reads.
    """
    if not config.task_option and config.judge is None:
        if config.judge_option:
            raise UserError(f"judge option {config.judge_option[0]!r}", "no judge is named", "name one with --judge")
        return {}
    known = load_options(find_task(config.task))
    judged = known.pop("judge", None) is not None
    options = read_options(config.task_option, known, what="task option", owner=f"task {config.task}")
    if config.judge is not None:
        if not judged:
            raise UserError(f"judge {config.judge!r}", f"no judge reads the answers of {config.task}", "leave it out")
        options["judge"] = _judge(config)
    return options


def companion_options(config: NamesTask, task: Task, companion: str) -> dict[str, Any]:
    """The same for a task that stands beside the config's: those of its options that the companion takes as well, and
    the judge that reads the task's own answers.

    Args:
        config: names the task.
        task: as it was loaded.
        companion: the other task's name.
    """
    known = load_options(find_task(companion))
    judged = known.pop("judge", None) is not None
    shared = [text for text in config.task_option if option_name(text) in known]
    options = read_options(shared, known, what="task option", owner=f"task {companion}")
    if judged and task.judge is not None:
        options["judge"] = task.judge
    elif judged and config.judge is not None:
        options["judge"] = _judge(config)
    return options


def check_same_rewards(run: Path, config: NamesTask, first: NamesTask) -> None:
    """Refuse runs whose rewards mean different things.

    Raises:
        UserError: task, its options, or the judge differ.
    """
    for name in REWARDED_BY:
        mine, other = getattr(config, name), getattr(first, name)
        if mine != other:
            raise UserError(
                f"run {run}", f"its {name.replace('_', ' ')} is {_shown(mine)}, not {_shown(other)}",
                "evaluate each task by itself" if name == "task" else "evaluate it by itself",
            )  # fmt: skip


def _judge(config: NamesTask) -> Judge:
    assert config.judge is not None
    options = read_options(
        config.judge_option, judge_options(config.judge), what="judge option", owner=f"judge {config.judge}"
    )
    judge = make_judge(config.judge, transcript=config.transcript, keep_requests=False, **options)
    if isinstance(judge, ClassifierJudge):
        judge.check()
    return judge


def _shown(value: str | tuple[str, ...] | None) -> str:
    return (value if isinstance(value, str) else " ".join(value or ())) or "the default"
