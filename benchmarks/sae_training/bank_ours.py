"""`trimtab train` with several architectures and sparsities: harvest, training, held-out measurement, files."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import trimtab
from sae_training.bank import BankJob
from sae_training.job import use_threads
from sae_training.pacing import peak_mib
from trimtab.training import TrainCommand, run_train
from trimtab.training.bank import TrainedBank


def main() -> None:
    job = BankJob.load(sys.argv[1])
    use_threads(job.threads)
    baseline = peak_mib()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        bank = run_train(
            TrainCommand(
                text=(job.text,),
                model=job.model,
                site=(job.site,),
                arch=job.architectures,
                l0=job.sparsities,
                n_features=(job.n,),
                batch_size=(job.batch,),
                rows=job.tokens,
                lr=(job.lr,),
                dead_after=10_000_000,
                heldout_rows=2048,
                limit_tokens=int(1.1 * job.tokens),
                run=Path(folder) / "bank",
                device=job.device,
            )
        )
        seconds = time.perf_counter() - began
    assert isinstance(bank, TrainedBank)
    if bank.problem is not None:
        raise bank.problem
    members = {row.name: row.result.l0 for row in bank.rows if row.result}
    spent: Counter[str] = Counter()
    for row in bank.rows:
        spent[row.arch] += row.result.seconds if row.result else 0.0
    answer = {
        "seconds": seconds, "baseline_mib": baseline, "peak_mib": peak_mib(), "version": trimtab.__version__,
        "includes": "trimtab train: model loading, harvest to shards, training, held-out measurement, runs",
        "l0": members, "thread_seconds_of_steps": {arch: round(s, 1) for arch, s in spent.items()},
    }  # fmt: skip
    with os.fdopen(int(sys.argv[2]), "w") as parent:
        print(json.dumps(answer), file=parent)


if __name__ == "__main__":
    main()
