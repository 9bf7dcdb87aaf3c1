"""SAELens's training loop, `SAETrainer.fit`, on a job's rows; started by `benchmarks/train_sae.py`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import sae_lens
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAE
from sae_lens.training.sae_trainer import SAETrainer
from sae_training.job import Job
from sae_training.pacing import Decoded, Paced
from torch import Tensor

INCLUDES = "SAETrainer.fit with the library's defaults: clipping, AuxK, sparsity statistics; no logging, no checkpoint"
NAMES = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}
GROUPS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
"""Matryoshka prefixes, those of trimtab's default groups of 1/32, 1/16, 1/8, 1/4 and the rest."""


def settings(job: Job) -> dict[str, Any]:
    """What the architecture needs to be told."""
    if job.architecture == "matryoshka":
        return {"k": job.k, "matryoshka_widths": [round(job.n * share) for share in GROUPS]}
    if job.architecture in ("topk", "batchtopk"):
        return {"k": job.k}
    if job.architecture == "jumprelu":
        return {"l0_coefficient": job.sparsity_weight}
    return {"l1_coefficient": job.sparsity_weight}


def fit(paced: Paced) -> Callable[[Tensor], Decoded]:
    """Train on the paced batches."""
    job = paced.job
    sae_class, config_class = get_sae_training_class(NAMES.get(job.architecture, job.architecture))
    sae = sae_class(config_class(d_in=job.d, d_sae=job.n, device=job.device, **settings(job)))
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=job.steps * job.batch,
            train_batch_size_samples=job.batch,
            lr=job.lr,
            lr_end=job.lr,
            lr_warm_up_steps=job.rising_steps,
            lr_decay_steps=job.steps - job.rising_steps - 1,
            device=job.device,
            autocast=paced.autocast,
            dead_feature_window=-(-job.dead_after // job.batch),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        paced.batches(),
    )
    trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        trainer.sae.save_inference_model(folder)
        trained = SAE.load_from_disk(folder, device=job.device)

    def decode(x: Tensor) -> Decoded:
        codes = trained.encode(x)
        return Decoded(trained.decode(codes), (codes > 0).sum(1))

    return decode


def main() -> None:
    paced = Paced(Job.load(sys.argv[1]), version=sae_lens.__version__, includes=INCLUDES)
    paced.finish(fit(paced))


if __name__ == "__main__":
    main()
