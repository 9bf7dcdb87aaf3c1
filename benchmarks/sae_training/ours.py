"""trimtab's training loop, `trimtab.training.train_all`, on a job's rows."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

import trimtab
from sae_training.job import Job
from sae_training.pacing import Decoded, Paced
from trimtab.dictionaries import load_dictionary
from trimtab.runs import Run
from trimtab.training import SiteRows, TrainConfig, Training, train_all
from trimtab.training.trainer import Trainer

INCLUDES = "trimtab.training.train_all: finite check, clipping, AuxK, logging every 50 steps, one checkpoint at the end"


class PacedSource:
    """The job's rows as an `ActivationSource`."""

    def __init__(self, paced: Paced) -> None:
        self.paced, self.job = paced, paced.job
        self.d, self.rows_total = self.job.d, self.job.steps * self.job.batch
        self.description: dict[str, object] = {"kind": "benchmark"}

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Tensor]:
        assert (batch_size, start_step) == (self.job.batch, 0)
        return self.paced.unpaced()

    def sample(self, n: int) -> Tensor:
        return self.paced.rows[-n:]


def config(job: Job) -> TrainConfig:
    """trimtab's defaults, but for what the job fixes."""
    rising = job.rising_steps / job.steps
    settings: dict[str, Any] = {
        "arch": job.architecture, "n_features": job.n, "batch_size": job.batch, "rows": job.steps * job.batch,
        "lr": job.lr, "warmup_share": rising, "decay": "linear", "decay_share": 1 - rising, "seed": job.seed,
        "dead_after": job.dead_after, "checkpoint_every": job.steps, "heldout_rows": 2048, "precision": job.precision,
    }  # fmt: skip
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    settings["l0" if "l0" in names else "k"] = job.k
    return TrainConfig(**settings)


def main() -> None:
    job = Job.load(sys.argv[1])
    paced = Paced(job, version=trimtab.__version__, includes=INCLUDES)
    source = PacedSource(paced)
    with tempfile.TemporaryDirectory() as folder:
        settings = config(job)
        advance = Trainer.advance

        def paced_advance(trainer: Trainer, batch: Any) -> None:
            paced.wait()  # not when batches are read, because the loop reads ahead
            advance(trainer, batch)

        Trainer.advance = paced_advance
        with Run.open(Path(folder) / "run", "train", settings, device=job.device) as run:
            training = Training(settings, SiteRows(source), run)
            train_all([training], device=job.device)
        if training.result is None:
            raise training.error or AssertionError("neither a result nor an error")
        sae = load_dictionary(training.result.sae).to(job.device)

    def decode(x: Tensor) -> Decoded:
        codes = sae.encode(x)
        return Decoded(sae.decode(codes), (codes > 0).sum(1))

    paced.finish(decode)


if __name__ == "__main__":
    main()
