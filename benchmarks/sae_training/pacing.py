"""Let a library's own training loop run a few steps at a time, so that several can take turns on one machine.

The loop asks for its next batch; `Paced` hands it out when the parent process says so, and times what happens between.
The parent asks on standard input and is answered on a pipe of its own, one JSON object a line; what the library prints
goes to a log.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import machine
import torch
from torch import Tensor

from sae_training.job import Job, Outcome, use_threads

BLOCK_ROWS = 2048


class Decoded(NamedTuple):
    """What an SAE makes of some rows."""

    x: Tensor
    """Reconstruction `[B, d]`."""
    fired: Tensor
    """Features that fire per row, `[B]`."""


class Paced:
    """The batches of a job, given out at the parent's pace.

    Args:
        job: what to train.
        includes: see `Outcome.includes`.
        version: of the library.
    """

    autocast: bool = False
    """Whether the library multiplies in bfloat16, by its own option for that."""

    def __init__(self, job: Job, *, version: str, includes: str) -> None:
        self.job, self._version, self._includes = job, version, includes
        self._parent = os.fdopen(int(sys.argv[2]), "w")
        use_threads(job.threads)
        torch.manual_seed(job.seed)
        self.rows = job.train_rows()
        self._baseline = peak_mib()
        self._left = self._asked = 0
        self._began: tuple[float, float] | None = None

    def batches(self) -> Iterator[Tensor]:
        """The job's batches; each waits until the parent has asked for it."""
        for batch in self.unpaced():
            self.wait()
            yield batch
        self._report()

    def unpaced(self) -> Iterator[Tensor]:
        """The same batches, for a loop that calls `wait` itself."""
        size = self.job.batch
        for step in range(self.job.steps):
            start = step * size % (len(self.rows) - size + 1)
            yield self.rows[start : start + size]

    def wait(self) -> None:
        """Before every step: report if the steps that were asked for are done, and wait for more to be asked."""
        if not self._left:
            self._report()
            self._left = self._asked = int(json.loads(sys.stdin.readline())["steps"])
            self._began = self._now()
        self._left -= 1

    def finish(self, decode: Callable[[Tensor], Decoded]) -> None:
        """After training: report the last steps, evaluate `decode` on the held-out rows, and answer."""
        self._report()
        peak = peak_mib()
        error = variance = fired = 0.0
        heldout = self.job.heldout_rows()
        mean = heldout.double().mean(0)
        with torch.no_grad():
            for x in heldout.split(BLOCK_ROWS):
                decoded = decode(x)
                error += float((x.double() - decoded.x.double()).square().sum())
                variance += float((x.double() - mean).square().sum())
                fired += float(decoded.fired.sum())
        outcome = Outcome(
            explained_variance=1 - error / variance,
            l0=fired / len(heldout),
            baseline_mib=self._baseline,
            peak_mib=peak,
            version=self._version,
            includes=self._includes,
        )
        self._say(dataclasses.asdict(outcome))

    def _report(self) -> None:
        if self._began is not None:
            seconds, cpu_seconds = (now - then for now, then in zip(self._now(), self._began, strict=True))
            self._say({"steps": self._asked - self._left, "seconds": seconds, "cpu_seconds": cpu_seconds})
            self._began = None

    def _now(self) -> tuple[float, float]:
        if self.job.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def _say(self, answer: dict[str, object]) -> None:
        print(json.dumps(answer), file=self._parent, flush=True)


def peak_mib() -> float:
    """Largest resident memory so far; on an accelerator, largest memory in use there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return machine.peak_mib()
