"""Several trainers, each in its own process, taking turns on one machine: who did how many rows a second, side by side.

Turns are a few steps long, so that whatever else slows the machine down slows all of them; a turn of one trainer and
the same turn of another make a pair, and comparisons are medians of the pairs' ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae_training.job import Job, Outcome

BENCHMARKS = Path(__file__).parents[1]


class Trainer(NamedTuple):
    """A script that trains, and the Python that runs it."""

    python: Path
    script: Path


class Spread(NamedTuple):
    """A figure over the turns."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one trainer did."""

    rates: list[float]
    """Rows per second of every turn."""
    cpu_rate: float
    """Rows per second of processor time, all threads together: what counts on a busy machine."""
    outcome: Outcome

    @property
    def rate(self) -> Spread:
        return spread(self.rates)


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(of: Measured, over: Measured) -> Spread:
    """How many times as fast, over the pairs of turns."""
    return spread([a / b for a, b in zip(of.rates, over.rates, strict=True)])


class Process:
    """One trainer at work. It waits for `ask`, trains so many steps, and answers."""

    def __init__(self, name: str, trainer: Trainer, job: Path, log: Path, threads: int) -> None:
        self.name, self.log = name, log
        answers, write = os.pipe()
        environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "OMP_NUM_THREADS": str(threads)}
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [trainer.python, trainer.script, job, str(write)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[write],
                text=True,
                env=environment,
            )
        os.close(write)
        self._answers = os.fdopen(answers)

    def ask(self, steps: int) -> dict[str, float]:
        """Train so many steps; says how many seconds they took."""
        assert self._process.stdin
        try:
            print(json.dumps({"steps": steps}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._died() from None
        return self.answer()

    def outcome(self) -> Outcome:
        """After the last step: what training came to."""
        outcome = Outcome(**self.answer())
        self._process.wait()
        return outcome

    def stop(self) -> None:
        """End the process if it is still there."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._answers.close()

    def answer(self) -> dict[str, Any]:
        """The next thing it says."""
        line = self._answers.readline()
        if not line:
            raise self._died()
        return json.loads(line)

    def _died(self) -> SystemExit:
        self._process.wait()
        end = "\n".join(self.log.read_text().splitlines()[-15:])
        return SystemExit(f"{self.name} stopped with {self._process.returncode}:\n{end}")


def take_turns(
    trainers: Mapping[str, Trainer], job: Job, folder: Path, *, warmup_steps: int, turn_steps: int
) -> dict[str, Measured]:
    """Let every trainer do the same job, a turn at a time; the order is reversed in every other round.

    Args:
        trainers: who takes part.
        job: what all of them train.
        folder: for the job and the trainers' logs.
        warmup_steps: first steps, which are not counted.
        turn_steps: steps of a turn.
    """
    rounds = (job.steps - warmup_steps - 1) // turn_steps
    assert job.steps == warmup_steps + rounds * turn_steps + 1, "steps that no turn covers"
    path = job.dump(folder / "job.json")
    processes: list[Process] = []
    try:
        for name, trainer in trainers.items():
            processes.append(Process(name, trainer, path, folder / f"{name}.log", job.threads))
            processes[-1].ask(warmup_steps)  # one at a time, so that imports don't disturb a neighbour's warm-up
        rates: dict[str, list[float]] = {name: [] for name in trainers}
        cpu_seconds = dict.fromkeys(trainers, 0.0)
        for turn in range(rounds):
            for process in processes if turn % 2 == 0 else reversed(processes):
                answer = process.ask(turn_steps)
                rates[process.name].append(answer["steps"] * job.batch / answer["seconds"])
                cpu_seconds[process.name] += answer["cpu_seconds"]
        outcomes = {}
        for process in processes:
            process.ask(1)  # a loop's last step ends with saving, and is not counted
            outcomes[process.name] = process.outcome()
        rows = rounds * turn_steps * job.batch
        return {
            name: Measured(rates=rates[name], cpu_rate=rows / cpu_seconds[name], outcome=outcome)
            for name, outcome in outcomes.items()
        }
    finally:
        for process in processes:
            process.stop()
