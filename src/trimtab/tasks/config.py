"""The part of a config that names a task and the judge of its answers, inherited by every command that needs one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.judges import ClassifierJudge, Judge, judge_options, make_judge
from trimtab.runs import LEFT_OUT_AT_DEFAULT, SourceName, check_least, option_name, read_options
from trimtab.tasks.registry import find_task, load_options, load_task, read_task
from trimtab.tasks.task import Task
from trimtab.tasks.tokens import Tokenizer

REWARDED_BY = ("task", "task_option", "judge", "judge_option")
"""Fields that say what is rewarded: rewards under different ones cannot be compared."""
TASK_FIELDS = (*REWARDED_BY, "data")
"""Fields by which a task is loaded."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task, and how its items are answered and judged."""

    task: str
    """Name of the task, or module:Class of your own."""
    data: Path | None = None
    """Directory of the official files of the task."""
    task_option: tuple[SourceName, ...] = field(default=(), metadata=LEFT_OUT_AT_DEFAULT)
    """Options of the task's loader, each NAME=VALUE: `shots=5`, `subjects=anatomy,virology`, `harmless=1`."""
    judge: SourceName | None = field(default=None, metadata=LEFT_OUT_AT_DEFAULT)
    """What reads answers to harmful prompts: `rules`, `classifier:PATH`, `endpoint:MODEL@URL`, or `module:Class` of
    your own; the task's own default, the rules, if not given."""
    judge_option: tuple[SourceName, ...] = field(default=(), metadata=LEFT_OUT_AT_DEFAULT)
    """Options of the judge, each NAME=VALUE: `threshold=0.7` of a classifier, `key_variable=MY_KEY` of an endpoint."""
    options_only: bool = False
    """Decode among the tokens of the options only, where a task has options."""
    max_new_tokens: int | None = None
    """Tokens to decode per item; the task's own if not given."""

    def __post_init__(self) -> None:
        check_least(self, 1, "max_new_tokens")

    @property
    def transcript(self) -> Path | None:
        """File that keeps the replies of a judge behind an endpoint."""
        return None

    def read_task(self) -> Task | None:
        """The task, if it needs no tokenizer: before there is a model, so that mistakes are known at once.

        Raises:
            UserError: see `read_task`; or an option that the task or the judge does not take, a value of another type,
                a judge that is not there or cannot be loaded, or a judge for a task whose answers none reads.
        """
        return read_task(self.task, self.data, **self._options())

    def load_task(self, tokenizer: Tokenizer) -> Task:
        """The task. Raises as `read_task` does."""
        return load_task(self.task, self.data, tokenizer, **self._options())

    def companion_options(self, task: Task, companion: str) -> dict[str, Any]:
        """What a task that stands beside the config's is loaded with: those of the options that it takes as well, and
        the judge that reads the task's own answers.

        Args:
            task: as it was loaded.
            companion: the other task's name.
        """
        known = load_options(find_task(companion))
        judged = known.pop("judge", None) is not None
        shared = [text for text in self.task_option if option_name(text) in known]
        options = read_options(shared, known, what="task option", owner=f"task {companion}")
        judge = task.judge or (self._judge(self.judge) if judged and self.judge is not None else None)
        return options | ({"judge": judge} if judged and judge is not None else {})

    def check_same_rewards(self, run: Path, first: TaskConfig) -> None:
        """Refuse a run whose rewards mean something else than another's.

        Raises:
            UserError: task, its options, or the judge differ.
        """
        for name in REWARDED_BY:
            mine, other = getattr(self, name), getattr(first, name)
            if mine != other:
                raise UserError(
                    f"run {run}", f"its {name.replace('_', ' ')} is {_shown(mine)}, not {_shown(other)}",
                    "evaluate each task by itself" if name == "task" else "evaluate it by itself",
                )  # fmt: skip

    def _options(self) -> dict[str, Any]:
        if not self.task_option and self.judge is None:
            if self.judge_option:
                raise UserError(f"judge option {self.judge_option[0]!r}", "no judge is named", "name one with --judge")
            return {}
        known = load_options(find_task(self.task))
        judged = known.pop("judge", None) is not None
        options = read_options(self.task_option, known, what="task option", owner=f"task {self.task}")
        if self.judge is not None:
            if not judged:
                raise UserError(f"judge {self.judge!r}", f"no judge reads the answers of {self.task}", "leave it out")
            options["judge"] = self._judge(self.judge)
        return options

    def _judge(self, name: str) -> Judge:
        options = read_options(self.judge_option, judge_options(name), what="judge option", owner=f"judge {name}")
        judge = make_judge(name, transcript=self.transcript, keep_requests=False, **options)
        if isinstance(judge, ClassifierJudge):
            judge.check()
        return judge


def _shown(value: str | tuple[str, ...] | None) -> str:
    return (value if isinstance(value, str) else " ".join(value or ())) or "the default"
