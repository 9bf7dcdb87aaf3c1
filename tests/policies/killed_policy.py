"""Run by test_train_killed.py: `trimtab policy train` in child processes that are killed with SIGKILL, then in peace.

A child kills itself at a named moment, or the parent kills it at a random one; the next child runs the same command.
The parent computes nothing, so that forking is safe. Some runs resume under a mutation, which the test must notice.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset  # noqa: F401  (what a child needs is imported once, here)
import tensordict.nn  # noqa: F401
import torch
import torchrl.modules
import torchrl.objectives.value  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import tyro  # noqa: F401

from trimtab import cli
from trimtab.policies import train
from trimtab.runs import Run
from trimtab.training import checkpoint

ITERATIONS, EVERY = 7, 3
ARGUMENTS = (
    "--task", "first_letter:FirstLetter", "--dose", "2.0", "--max-new-tokens", "3", "--iterations", str(ITERATIONS),
    "--items-per-iteration", "4", "--samples", "2", "--hidden", "8", "--validate-every", "2", "--validation-items", "4",
    "--checkpoint-every", str(EVERY), "--ppo.minibatch", "8", "--ppo.epochs", "2", "--temperature", "0.7",
    "--options-only",
)  # fmt: skip


def die(*_args: object, **_options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(owner: Any, name: str, call: int, *, first: bool = True) -> None:
    """Die at the given call of a function, before or after it."""
    original, calls = getattr(owner, name), [0]

    @functools.wraps(original)
    def counted(*args: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] < call:
            return original(*args, **options)
        if not first:
            original(*args, **options)
        return die()

    setattr(owner, name, counted)


def die_in_a_half_written_checkpoint(call: int) -> None:
    original, calls = checkpoint.save_file, [0]

    def save(tensors: object, path: Path, **options: object) -> None:
        calls[0] += 1
        original(tensors, path, **options)  # pyright: ignore[reportArgumentType]
        if calls[0] == call:
            with open(path, "r+b") as file:
                file.truncate(100)
            die()

    checkpoint.save_file = save


MOMENTS: dict[str, Callable[[], None]] = {
    "before the first checkpoint": lambda: die_at(train, "write_checkpoint", 1),
    "in the first checkpoint": lambda: die_in_a_half_written_checkpoint(1),
    "after the first checkpoint": lambda: die_at(train, "write_checkpoint", 1, first=False),
    "between checkpoints, in an update": lambda: die_at(train.Learner, "update", 2),
    "between checkpoints, after metrics": lambda: die_at(train._Trainer, "_log", EVERY - 1, first=False),
    "in a later checkpoint": lambda: die_in_a_half_written_checkpoint(1),
    "after a later checkpoint": lambda: die_at(train, "write_checkpoint", 1, first=False),
    "before the last checkpoint": lambda: die_at(train, "write_checkpoint", 2),
    "after the last checkpoint": lambda: die_at(train, "write_checkpoint", 1, first=False),
    "before the results": lambda: die_at(Run, "finish", 1),
}
"""In this order, each child going on from where the one before died."""


def forget_adams_moments() -> None:
    """Adam starts anew, its moments at zero."""
    torch.optim.Adam.load_state_dict = lambda *_: None


def forget_the_best_policy() -> None:
    """The kept policy and its reward start from nothing."""
    original = train._Trainer._load

    def load(self: Any) -> None:
        original(self)
        self.facts["best_reward"] = -1.0

    train._Trainer._load = load


def keep_lines_after_the_checkpoint() -> None:
    """Iterations that are done again are logged twice."""
    Run.drop_metrics_after = lambda *_: None


def forget_the_normaliser() -> None:
    """Observations are normalised by what is seen after resuming only."""
    original = train._Trainer._load

    def load(self: Any) -> None:
        original(self)
        if self.iteration:
            self.policy.normaliser.count.zero_()

    train._Trainer._load = load


MUTATIONS = {
    f.__name__: f
    for f in (
        forget_adams_moments, forget_the_best_policy, keep_lines_after_the_checkpoint, forget_the_normaliser
    )
}  # fmt: skip


def command(root: Path, directory: Path) -> list[str]:
    parts = ["--model", str(root / "model"), "--sae", str(root / "sae"), "--run", str(directory)]
    return ["policy", "train", *ARGUMENTS, *parts]


def child(root: Path, directory: Path, *prepare: Callable[[], None]) -> int:
    """Run the command in a child; give its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            for step in prepare:
                step()
            status = cli.main(command(root, directory))
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> str:
    """How a child ended: `killed` or its exit status."""
    _, status = os.waitpid(pid, 0)
    return "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else str(os.WEXITSTATUS(status))


def lines(directory: Path) -> int:
    metrics = directory / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill_from_outside(root: Path, directory: Path) -> list[str]:
    """Kill at random moments after given numbers of lines."""
    found = []
    for target in (1, 4, 8):
        pid = child(root, directory)
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if lines(directory) >= target:
                time.sleep(random.uniform(0, 0.03))
                os.kill(pid, signal.SIGKILL)
                found.append(ended(pid))
                break
            time.sleep(0.001)
        else:
            found.append("done")
    found.append(ended(child(root, directory)))
    return found


def main(root: Path) -> None:
    cli.COMMANDS["policy train"]()  # imports what children need
    found = {"whole": [ended(child(root, root / "whole"))]}
    at_moments = [ended(child(root, root / "moments", prepare)) for prepare in MOMENTS.values()]
    found["moments"] = [*at_moments, ended(child(root, root / "moments"))]
    found["random"] = kill_from_outside(root, root / "random")
    found["forgetting"] = [ended(child(root, root / "forgetting", lambda: die_at(train, "write_checkpoint", 3)))]
    for name, mutate in MUTATIONS.items():
        shutil.copytree(root / "forgetting", root / name)
        found[name] = [ended(child(root, root / name, mutate))]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
