"""How an SAE is trained: sizes, sparsity, schedule, scaling, checkpoints. Defaults after the common recipes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from trimtab.dictionaries.architectures import trainable_class
from trimtab.dictionaries.precision import Precision, precision_on
from trimtab.dictionaries.trainable import TrainableSAE
from trimtab.errors import UserError
from trimtab.runs import LEFT_OUT_AT_DEFAULT, check_choices, check_least, check_values
from trimtab.training.options import architecture_config, architecture_options, with_options

Scaling = Literal["sqrt_d", "unit", "none"]
Decay = Literal["linear", "cosine", "none"]
MAX_WARMUP = 1_000
DEFAULT_L0 = 32.0
"""Active features per row, where a config says nothing about sparsity."""


@with_options(architecture_options())
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the trainings of a sweep usually share, and the options of all architectures, None unless they are set."""

    epochs: float = 1.0
    """Passes over the rows of the source, unless `rows` is given."""
    rows: int | None = None
    """Rows to train on in all; goes through the source again where it holds fewer."""
    warmup_share: float = 0.05
    """Share of the steps over which the learning rate rises from 0, but at most 1,000 steps."""
    decay: Decay = "linear"
    """How the learning rate falls to 0 at the end."""
    decay_share: float = 0.3
    """Share of the steps over which it falls."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of all parameters; 0 does not clip."""
    scaling: Scaling = "sqrt_d"
    """One scalar for all rows: `sqrt_d` makes E‖x‖ = √d, `unit` E‖x‖² = 1. Folded into the saved weights. Sparsity
    weights and bandwidths do not carry over from one to the other."""
    dead_after: int | None = None
    """Rows without firing after which a feature is dead; a tenth of all rows, at most 10 million, if not given."""
    ema_decay: float = 0.0
    """Above 0, the saved weights are an average over steps with this decay, from the first decay step on."""
    sample_rows: int = 16_384
    """Rows from which scale and bias are estimated."""
    heldout_rows: int = 65_536
    """Held-out rows on which the result is measured, thresholds are set and statistics are computed."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last two are kept."""
    log_every: int = 50
    """Steps between lines of metrics."""
    precision: Precision = field(default="auto", metadata=LEFT_OUT_AT_DEFAULT)
    """Precision of dense matrix products; weights, moments and sums are in fp32 in any case. `bf16` takes operands
    rounded to bfloat16, `tf32` is of CUDA cards alone; `auto` is tf32 on those that have it, else fp32."""
    save_dtype: Literal["float32", "float16"] = "float32"
    """Precision of encoder and decoder in the saved file."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe):
    """Training of one SAE."""

    arch: str = "topk"
    """Architecture, by a name in `dictionaries.architectures.TRAINABLE`."""
    n_features: int = 4096
    """Features to learn."""
    l0: float | None = None
    """Active features per row, on average; 32 if nothing is said about sparsity. TopK-like architectures take it as k;
    the others drive their sparsity weight or thresholds there."""
    k: int | None = None
    """The same under TopK's own name."""
    sparsity_weight: float | None = None
    """Weight of the sparsity penalty, for architectures that have one."""
    batch_size: int = 1024
    """Rows per step."""
    lr: float | None = None
    """Adam's peak learning rate; 1e-3 · √(2^14 / n_features), at most 2e-3, if not given. That is for a few million
    rows; for a hundred times as many, Gao et al. (2024) take a fifth of it."""
    seed: int = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        check_values(
            self, "positive and finite", lambda value: 0 < value < math.inf, "batch_size", "epochs", "sample_rows",
            "heldout_rows", "checkpoint_every", "log_every", "rows", "lr", "dead_after", "l0", "k",
        )  # fmt: skip
        check_values(self, "from 0 to 1", lambda value: 0 <= value <= 1, "warmup_share", "decay_share")
        check_values(self, "from 0 to below 1", lambda value: 0 <= value < 1, "beta1", "beta2", "ema_decay")
        check_least(self, 0, "clip_norm")
        check_choices(self)
        if self.k is not None and self.l0 is not None:
            raise UserError(f"k {self.k} and l0 {self.l0:g}", "they say the same thing twice", "give one of them")
        architecture_config(vars(self), self.wanted_l0, self.dead_after or 1)

    @property
    def wanted_l0(self) -> float | None:
        """What the config asks for as `l0`; 32 if it says nothing about sparsity, None if it says something else."""
        unsaid = self.l0 is None and self.k is None and self.sparsity_weight is None
        return DEFAULT_L0 if unsaid else self.l0

    @property
    def l0_target(self) -> float | None:
        """Active features per row that training aims at; None where a fixed weight decides."""
        config = architecture_config(vars(self), self.wanted_l0, self.dead_after or 1)
        target = getattr(config, "k", None) or getattr(config, "l0", None)
        return None if target is None else float(target)

    def steps(self, rows_total: int) -> int:
        """Optimiser steps over a source with `rows_total` rows per epoch."""
        rows = self.rows if self.rows is not None else round(self.epochs * rows_total)
        return max(1, rows // self.batch_size)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr is not None else min(2e-3, 1e-3 * math.sqrt(2**14 / self.n_features))

    def lr_factor(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at `step` of `steps` (both count from 0)."""
        warmup = min(MAX_WARMUP, round(self.warmup_share * steps))
        rising = (step + 1) / warmup if step < warmup else 1.0
        decay = round(self.decay_share * steps)
        left = min(1.0, (steps - step) / decay) if decay and self.decay != "none" else 1.0
        return rising * ((1 - math.cos(math.pi * left)) / 2 if self.decay == "cosine" else left)

    def first_averaged_step(self, steps: int) -> int:
        """Where the average of the weights begins: with the decay of the learning rate."""
        return steps - round(self.decay_share * steps)

    def build(
        self, d: int, steps: int, device: str | torch.device = "cpu", begun_in: Precision | None = None
    ) -> TrainableSAE:
        """The SAE to train on rows of width d; its initial weights do not depend on the device.

        Args:
            d: width of the rows.
            steps: of the whole training.
            device: where to compute.
            begun_in: what `auto` is for a training that has begun.

        Raises:
            UserError: the device has no products of that precision.
        """
        dead_after = self.dead_after or min(10_000_000, max(1, steps * self.batch_size // 10))
        config = architecture_config(vars(self), self.wanted_l0, dead_after)
        asked = begun_in if begun_in is not None and self.precision == "auto" else self.precision
        config = dataclasses.replace(config, precision=precision_on(device, asked))
        return trainable_class(self.arch)(config, d, seed=self.seed).to(device)
