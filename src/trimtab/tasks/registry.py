"""Tasks by name, and how a user adds one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from trimtab.errors import UserError
from trimtab.runs import keyword_types, registered_class
from trimtab.tasks.bbq import BBQAmbiguous, BBQDisambiguated
from trimtab.tasks.data_rows import hub_name, is_hub
from trimtab.tasks.gsm8k import GSM8K
from trimtab.tasks.harmbench import HarmBench
from trimtab.tasks.ioi import IOI, IOIMixture, IOISwapped
from trimtab.tasks.mmlu import MMLU
from trimtab.tasks.prompts import PromptTask
from trimtab.tasks.task import Task
from trimtab.tasks.tokens import Tokenizer
from trimtab.tasks.xstest import XSTest

DATA_VARIABLE = "TRIMTAB_DATA"
"""Environment variable with the data directory that is used where none is given."""

_CLASSES = (MMLU, BBQAmbiguous, BBQDisambiguated, GSM8K, HarmBench, XSTest, IOI, IOISwapped, IOIMixture)
TASKS: dict[str, type[Task]] = {task.name: task for task in _CLASSES}
"""Every task class by its name."""

_TaskClass = TypeVar("_TaskClass", bound=type[Task])


def register(task: _TaskClass) -> _TaskClass:
    """Class decorator: make a task known by its name.

    Raises:
        UserError: another task has the name.
    """
    if TASKS.get(task.name, task) is not task:
        raise UserError(f"task {task.name!r}", "there is already a task of this name", "choose another name")
    TASKS[task.name] = task
    return task


def find_task(name: str) -> type[Task]:
    """A task class by its registered name, or by `module:Class` (see `runs.find_class`).

    Raises:
        UserError: there is no such task, or it was made in Python from prompts and a reward.
    """
    if name == PromptTask.name and name not in TASKS:
        raise UserError(
            f"task {name!r}",
            "its prompts and its reward are in Python, and no command can read them",
            "compare its policy with controls there: policy.compare()",
        )
    return registered_class(name, "task", TASKS, Task)


def load_task(
    name: str, data: str | os.PathLike[str] | None = None, tokenizer: Tokenizer | None = None, **options: Any
) -> Task:
    """Load a task with its items.

    Args:
        name: a registered name, or `module:Class`.
        data: the data directory, one folder per benchmark; `hub` or `hub:NAME`; None for `$TRIMTAB_DATA`.
        tokenizer: the model's, for tasks whose items depend on it.
        options: what the task's own `load` takes.

    Raises:
        UserError: no such task or option, the data cannot be found or read, or a row is wrong.
    """
    task, place = _found(name, data, options)
    return task.load(place, tokenizer, **options)


def read_task(name: str, data: str | os.PathLike[str] | None = None, **options: Any) -> Task | None:
    """Load a task before there is a model, so that what is wrong with its name or data is known at once.

    Args:
        name: as for `load_task`.
        data: as for `load_task`.
        options: as for `load_task`.

    Returns:
        The task; None if its items need a tokenizer, so that `load_task` has to follow.

    Raises:
        UserError: as for `load_task`.
    """
    task, place = _found(name, data, options)
    return None if task.needs_tokenizer else task.load(place, **options)


def load_options(task: type[Task]) -> dict[str, Any]:
    """The options that a task's `load` takes beside data and tokenizer: types by name."""
    return keyword_types(task.load)


def _found(name: str, data: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> tuple[type[Task], str | None]:
    """A task that takes these options, and where its data are."""
    task = find_task(name)
    accepted = load_options(task) if options else {}
    for option in options:
        if option not in accepted:
            raise UserError(
                f"option {option!r}",
                f"task {task.name} takes {', '.join(accepted) or 'none'}",
                "leave it out",
            )
    place = str(data or os.environ.get(DATA_VARIABLE) or "")
    if not task.files:
        return task, place or None
    if not place:
        hub = f", or data='hub' for {task.hub}" if task.hub else ""
        raise UserError(
            f"task {task.name}",
            f"it needs a data directory with {', '.join(task.files)}",
            f"give the directory, or set {DATA_VARIABLE}{hub}",
        )
    if is_hub(place):
        hub_name(place, task.hub, task.name)
        return task, place
    return task, str(Path(place).expanduser())
