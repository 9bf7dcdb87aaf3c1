"""sparsify's training loop, `Trainer.fit`, on a job's rows. Run by `benchmarks/train_sae.py` in sparsify's environment.

sparsify reads activations off a model. The model here is a table of the job's rows: token i's activation is row i.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace

import torch
from datasets import Dataset
from sae_training.job import Job
from sae_training.pacing import Decoded, Paced
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn

INCLUDES = (
    "Trainer.fit, optimiser adam, auxk_alpha 1/32, else defaults: AuxK, no clipping; no logging, saved at the end"
)
SEQUENCE = 128


class RowTable(nn.Module):
    """As much of a transformer as sparsify asks for."""

    def __init__(self, paced: Paced) -> None:
        super().__init__()
        self.rows = nn.Embedding(*paced.rows.shape, _weight=paced.rows, _freeze=True)
        self.paced = [paced]
        self.device = paced.rows.device
        self.config = SimpleNamespace(hidden_size=paced.job.d, num_hidden_layers=1)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> RowTable:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.numel() > 1:
            self.paced[0].wait()
        return self.rows(input_ids)


def fit(paced: Paced) -> Callable[[Tensor], Decoded]:
    """Train on the paced batches."""
    job = paced.job
    if job.architecture != "topk":
        raise SystemExit("this script trains topk")
    order = torch.cat([torch.arange(job.batch) + step * job.batch % (len(paced.rows) - job.batch + 1)
                       for step in range(job.steps)])  # fmt: skip
    dataset = Dataset.from_dict({"input_ids": order.reshape(-1, SEQUENCE).numpy()}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=job.n, k=job.k),
            batch_size=job.batch // SEQUENCE,
            optimizer="adam",
            lr=job.lr,
            lr_warmup_steps=job.rising_steps,
            auxk_alpha=1 / 32,
            dead_feature_threshold=job.dead_after,
            hookpoints=["rows"],
            init_seeds=[job.seed],
            log_to_wandb=False,
            save_dir=folder,
        )
        trainer = Trainer(config, dataset, RowTable(paced))  # type: ignore[arg-type]
        trainer.fit()
    (trained,) = trainer.saes.values()

    def decode(x: Tensor) -> Decoded:
        out = trained(x)
        return Decoded(out.sae_out, (out.latent_acts > 0).sum(1))

    return decode


def main() -> None:
    paced = Paced(Job.load(sys.argv[1]), version=version("eai-sparsify"), includes=INCLUDES)
    paced.finish(fit(paced))


if __name__ == "__main__":
    main()
