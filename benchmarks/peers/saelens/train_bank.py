"""SAELens's `MultiSAETrainingRunner`: many SAEs in lockstep on activations of one model; see `benchmarks/train_sae.py`.

It has no targets for L0, so that architectures with a penalty get six weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

import sae_lens
from datasets import Dataset
from sae_lens.config import LoggingConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_training.job import use_threads
from sae_training.pacing import peak_mib

NAMES = {"relu": "standard"}


def saes(job: Any) -> dict[str, Any]:
    """A config for each architecture and sparsity."""
    found = {}
    for architecture in job.architectures:
        config = get_sae_training_class(NAMES.get(architecture, architecture))[1]
        for k, weight in zip(job.sparsities, job.weights, strict=False):
            sparsity = {"k": k} if "topk" in architecture else {
                "l0_coefficient" if architecture == "jumprelu" else "l1_coefficient": weight
            }  # fmt: skip
            found[f"{architecture}-{k}"] = config(
                d_in=job.d, d_sae=job.n, normalize_activations="expected_average_only_in", device=job.device, **sparsity
            )
    return found


def main() -> None:
    with open(sys.argv[1]) as file:
        job = type("Job", (), json.load(file))
    use_threads(job.threads)
    baseline = peak_mib()
    with tempfile.TemporaryDirectory() as folder, open(job.text) as text:
        began = time.perf_counter()
        config = MultiSAETrainingRunnerConfig(
            saes=saes(job),
            hook_names=job.hook,
            model_name=job.model,
            model_class_name="AutoModelForCausalLM",
            dataset_path="sample",
            streaming=False,
            context_size=256,
            store_batch_size_prompts=8,
            n_batches_in_buffer=max(2 * job.batch, job.tokens // 4)
            // 256,  # counted in contexts, of which it mixes half
            n_batches_for_norm_estimate=2,
            training_tokens=job.tokens,
            train_batch_size_tokens=job.batch,
            lr=job.lr,
            device=job.device,
            logger=LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=folder,
        )
        dataset = Dataset.from_dict({"text": [json.loads(line)["text"] for line in text]})
        runner = MultiSAETrainingRunner(config, override_dataset=dataset)
        trained = runner.run()
        seconds = time.perf_counter() - began
    answer = {
        "seconds": seconds, "baseline_mib": baseline, "peak_mib": peak_mib(), "version": sae_lens.__version__,
        "includes": "MultiSAETrainingRunner: model loading, activations through a buffer, training, saved models",
        "l0": {name: sae.cfg.metadata.l0 for name, sae in trained.items()},
    }  # fmt: skip
    with os.fdopen(int(sys.argv[2]), "w") as parent:
        print(json.dumps(answer), file=parent)


if __name__ == "__main__":
    main()
