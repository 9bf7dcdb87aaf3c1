"""Tasks: prompts in fixed splits, how an answer is read, and its reward. No torch is loaded by importing them.

`load_task("mmlu", data="DIRECTORY")` gives a `Task`; `docs/tasks.md` describes each and shows how to add one.
"""

from trimtab.tasks.config import TASK_FIELDS, TaskConfig
from trimtab.tasks.prompts import PromptTask
from trimtab.tasks.registry import DATA_VARIABLE, TASKS, find_task, load_options, load_task, read_task, register
from trimtab.tasks.task import (
    SPLITS,
    Companion,
    Item,
    Outcome,
    Task,
    UnsuitedModelError,
    known_under_every_order,
    split_items,
)
from trimtab.tasks.tokens import Tokenizer

__all__ = [
    "DATA_VARIABLE",
    "SPLITS",
    "TASKS",
    "TASK_FIELDS",
    "Companion",
    "Item",
    "Outcome",
    "PromptTask",
    "Task",
    "TaskConfig",
    "Tokenizer",
    "UnsuitedModelError",
    "find_task",
    "known_under_every_order",
    "load_options",
    "load_task",
    "read_task",
    "register",
    "split_items",
]
