"""dictionary_learning's training loop, `trainSAE`, on a job's rows; started by `benchmarks/train_sae.py`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from sae_training.job import Job
from sae_training.pacing import Decoded, Paced
from torch import Tensor

INCLUDES = "trainSAE with TopKTrainer's defaults: clipping, AuxK, threshold; no logging, one save at the end"


def fit(paced: Paced) -> Callable[[Tensor], Decoded]:
    """Train on the paced batches."""
    job = paced.job
    if job.architecture != "topk":
        raise SystemExit("this script trains topk")

    class Trainer(TopKTrainer):
        """The only way to another age at which features count as dead than 10 million rows."""

        def __init__(self, **arguments: object) -> None:
            super().__init__(**arguments)  # type: ignore[arg-type]
            self.dead_feature_threshold = job.dead_after

    trainer = {
        "trainer": Trainer,
        "steps": job.steps,
        "activation_dim": job.d,
        "dict_size": job.n,
        "k": job.k,
        "layer": 0,
        "lm_name": "none",
        "lr": job.lr,
        "warmup_steps": job.rising_steps,
        "decay_start": job.rising_steps + 1,
        "seed": job.seed,
        "device": job.device,
    }
    with tempfile.TemporaryDirectory() as folder:
        dtype = torch.bfloat16 if paced.autocast else torch.float32
        trainSAE(paced.batches(), [trainer], steps=job.steps, save_dir=folder, device=job.device, autocast_dtype=dtype)
        trained = AutoEncoderTopK.from_pretrained(str(Path(folder) / "trainer_0" / "ae.pt"), device=job.device)

    def decode(x: Tensor) -> Decoded:
        codes = trained.encode(x)
        return Decoded(trained.decode(codes), (codes > 0).sum(1))

    return decode


def main() -> None:
    paced = Paced(Job.load(sys.argv[1]), version=version("dictionary-learning"), includes=INCLUDES)
    paced.finish(fit(paced))


if __name__ == "__main__":
    main()
