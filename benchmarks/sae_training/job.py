"""What a trainer is told to do, and what it answers. Peers' environments import this, so it needs torch only."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training, the same for every library."""

    rows: str
    """Directory with `train.pt` and `heldout.pt`: float32 rows, scaled so that their mean norm is √d."""
    architecture: str
    """trimtab's name: topk, batchtopk, matryoshka, relu, gated, jumprelu."""
    d: int
    n: int
    """Features."""
    k: int
    """Active features per row; the target where sparsity is driven by a weight."""
    batch: int
    steps: int
    """Optimiser steps, warm-up included."""
    lr: float = 1e-3
    """Adam's peak; rises linearly over the first steps, then falls linearly to 0."""
    rising_steps: int = 1
    sparsity_weight: float = 1.0
    """Coefficient of the sparsity penalty, for libraries without a target."""
    dead_after: int = 10_000_000
    """Rows without firing after which a feature counts as dead, as in Gao et al. (2024)."""
    threads: int = 2
    seed: int = 0
    device: str = "cpu"
    precision: str = "auto"
    """trimtab's alone: of its dense products."""

    def dump(self, path: Path) -> Path:
        """Write the job for a worker."""
        path.write_text(json.dumps(dataclasses.asdict(self)))
        return path

    @classmethod
    def load(cls, path: str) -> Job:
        """Read what `dump` wrote."""
        return cls(**json.loads(Path(path).read_text()))

    def train_rows(self) -> Tensor:
        """All training rows, in memory, on the job's device."""
        return torch.load(Path(self.rows) / "train.pt", weights_only=True).to(self.device)

    def heldout_rows(self) -> Tensor:
        """Rows that nothing is trained on."""
        return torch.load(Path(self.rows) / "heldout.pt", weights_only=True).to(self.device)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trainer came to."""

    explained_variance: float
    """On the held-out rows: 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    l0: float
    """Features that fire on a held-out row, on average."""
    baseline_mib: float
    """Resident memory with the library imported and the rows loaded, before there was an SAE."""
    peak_mib: float
    """Largest resident memory until training ended."""
    version: str
    includes: str
    """What its steps do beyond the update itself, and how it was called."""


def use_threads(threads: int) -> None:
    """Let torch use so many; call before any work."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
