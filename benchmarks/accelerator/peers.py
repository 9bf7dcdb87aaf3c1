"""The other libraries' own training loops, in this process, as far as they can be imported here."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from sae_training.job import Job
from sae_training.pacing import Paced
from torch import Tensor

from accelerator.sections import Peak, say

PEERS = Path(__file__).parents[1] / "peers"
MODULES = {"sparsify": "sparsify", "saelens": "sae_lens", "dictionary_learning": "dictionary_learning"}
"""What is imported of each."""
TRAINS = {"saelens": {"topk", "batchtopk", "jumprelu", "gated", "relu", "matryoshka"}}
"""Architectures of those that train more than TopK."""
NO_AUTOCAST = {"sparsify"}


class Timed(Paced):
    """A job's batches for a loop in this process, timed from one step to another.

    Args:
        job: what to train; it has one step more than are looked at, since loops save behind the last.
        rows: on the job's device.
        warmup: first steps, which are not counted.
        autocast: see `Paced`.
    """

    def __init__(self, job: Job, rows: Tensor, *, warmup: int, autocast: bool) -> None:
        self.job, self.rows, self.autocast, self._warmup = job, rows, autocast, warmup
        self._taken, self._last, self.seconds = 0, 0.0, 0.0

    def wait(self) -> None:
        """Called by the loop before every step."""
        if self._taken in (self._warmup, self.job.steps - 1):
            if torch.device(self.job.device).type == "cuda":
                torch.cuda.synchronize(self.job.device)
            now = time.perf_counter()
            self.seconds, self._last = now - self._last, now
        self._taken += 1

    def _report(self) -> None:
        """Nobody waits for an answer."""


class Trained(NamedTuple):
    """How fast a library trained."""

    rows_per_second: float
    peak_mib: float | None


def names(architecture: str, *, bf16: bool) -> list[str]:
    """Libraries that are here and train an architecture."""
    found = [name for name, module in MODULES.items() if importlib.util.find_spec(module) is not None]
    able = [name for name in found if architecture in TRAINS.get(name, {"topk"})]
    return [name for name in able if not (bf16 and name in NO_AUTOCAST)]


def train(name: str, job: Job, rows: Tensor, *, warmup: int, autocast: bool) -> Trained | None:
    """Let a library train; None, with a line that says why, if it fails."""
    timed = Timed(job, rows, warmup=warmup, autocast=autocast)
    try:
        with Peak(job.device) as peak:
            _fit_of(name)(timed)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        say(f"{name} {job.architecture}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return None
    return Trained((job.steps - 1 - warmup) * job.batch / timed.seconds, peak.mib)


def _fit_of(name: str) -> Callable[[Paced], object]:
    """`fit` of the peer's script."""
    spec = importlib.util.spec_from_file_location(f"{name}_training", PEERS / name / "train_saes.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.fit
