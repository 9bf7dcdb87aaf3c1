"""How an SAE is trained: sizes, sparsity, schedule, scaling, checkpoints. Defaults after the common recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from trimtab.dictionaries.architectures import trainable_class
from trimtab.dictionaries.trainable import BiasInit, EncoderDtype, TrainableSAE
from trimtab.errors import UserError
from trimtab.training.architectures import architecture_config

Scaling = Literal["sqrt_d", "unit", "none"]
Decay = Literal["linear", "cosine", "none"]
DEFAULT_L0 = 32.0
"""Active features per row, where a config says nothing about sparsity."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the trainings of a sweep usually share. Fields that are None are the architecture's to choose."""

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
    b_dec_init: BiasInit | None = None
    """Where the decoder bias starts."""
    apply_b_dec_to_input: bool | None = None
    """Whether the encoder sees x − b_dec."""
    encoder_dtype: EncoderDtype | None = None
    """Precision of the dense product that finds active features; `bfloat16` is faster on processors with matrix units
    for it. Codes and gradients are in float32 in any case."""
    block_rows: int | None = None
    """Rows encoded at once."""
    k_start: int | None = None
    """TopK-like: active features per row at the start; shrinks to k over `k_anneal_share` of the training."""
    k_anneal_share: float | None = None
    """TopK-like: share of the steps over which k_start shrinks to k."""
    aux_coefficient: float | None = None
    """TopK-like: weight of the AuxK loss, which revives dead features; 0 leaves it out."""
    k_aux: int | None = None
    """TopK-like: dead features per row that AuxK uses."""
    threshold_momentum: float | None = None
    """BatchTopK and Matryoshka: how much of the running threshold each batch keeps."""
    groups: tuple[float, ...] | None = None
    """Matryoshka: share of the features in each group; the groups before and with it reconstruct the row on their own.
    Shares sum to 1."""
    sparsity_warmup_share: float | None = None
    """Where a penalty makes codes sparse: share of the steps over which its weight rises from 0."""
    decoder_norm: Literal["unit", "free"] | None = None
    """ReLU and p-anneal: decoder rows of norm 1, or free ones with the penalty on f·‖W_dec‖."""
    p_end: float | None = None
    """p-anneal: last exponent of the penalty Σ f^p."""
    p_start_share: float | None = None
    """p-anneal: share of the steps after which p begins to fall from 1."""
    p_steps: int | None = None
    """p-anneal: in how many steps p falls."""
    penalty: Literal["l0_target", "tanh", "l0"] | None = None
    """JumpReLU: what is penalised."""
    bandwidth: float | None = None
    """JumpReLU: width of the straight-through estimator's window."""
    theta_init: float | None = None
    """JumpReLU: where thresholds start."""
    tanh_scale: float | None = None
    """JumpReLU: scale within the tanh penalty."""
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
    save_dtype: Literal["float32", "float16"] = "float32"
    """Precision of encoder and decoder in the saved file."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe):
    """Training of one SAE."""

    arch: str = "topk"
    """Architecture: topk, batchtopk, matryoshka, relu, panneal, gated or jumprelu. A name of `registry.TRAINABLE`."""
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
        positive = ("batch_size", "epochs", "sample_rows", "heldout_rows", "checkpoint_every", "log_every")
        optional = ("rows", "lr", "dead_after", "l0", "k", "k_aux", "block_rows")
        for name in (*positive, *(o for o in optional if getattr(self, o) is not None)):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} {value}", "it must be positive and finite", "set it above 0")
        for name in ("warmup_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)}", "a share is from 0 to 1", "set it so")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}", "it must be from 0 to below 1", "set it so")
        if not self.clip_norm >= 0:
            raise UserError(f"clip_norm {self.clip_norm}", "it must not be negative", "set it to 0 or more")
        choices = {"scaling": Scaling, "decay": Decay, "b_dec_init": BiasInit, "encoder_dtype": EncoderDtype}
        for name, allowed in choices.items():
            if getattr(self, name) not in (None, *allowed.__args__):
                raise UserError(
                    f"{name} {getattr(self, name)!r}", f"it is one of {', '.join(allowed.__args__)}", "choose one"
                )
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

    def build(self, d: int, steps: int, device: str | torch.device = "cpu") -> TrainableSAE:
        """The SAE to train on rows of width d; its initial weights do not depend on the device."""
        dead_after = self.dead_after or min(10_000_000, max(1, steps * self.batch_size // 10))
        config = architecture_config(vars(self), self.wanted_l0, dead_after)
        return trainable_class(self.arch)(config, d, seed=self.seed).to(device)
