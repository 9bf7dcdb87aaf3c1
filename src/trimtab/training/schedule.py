"""How the learning rate changes from step to step, and where averaging begins."""

from __future__ import annotations

import math

from trimtab.training.config import TrainConfig

MAX_WARMUP = 1_000


def lr_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` of `steps` (both count from 0)."""
    warmup = min(MAX_WARMUP, round(config.warmup_share * steps))
    rising = (step + 1) / warmup if step < warmup else 1.0
    decay = round(config.decay_share * steps)
    left = min(1.0, (steps - step) / decay) if decay else 1.0
    if config.decay == "none":
        left = 1.0
    elif config.decay == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return rising * left


def first_averaged_step(config: TrainConfig, steps: int) -> int:
    """Where the average of the weights begins: with the decay of the learning rate."""
    return steps - round(config.decay_share * steps)
