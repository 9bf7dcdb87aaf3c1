"""How an SAE is trained: sizes, schedule, scaling, checkpoints. Defaults after the common recipes (see each field)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trimtab.dictionaries.batchtopk import BatchTopKConfig, TrainableBatchTopK
from trimtab.dictionaries.encoding import EncoderDtype
from trimtab.dictionaries.topk import TopKConfig, TrainableTopK
from trimtab.dictionaries.trainable import BiasInit, TrainableSAE
from trimtab.errors import UserError

Architecture = Literal["topk", "batchtopk"]
Scaling = Literal["sqrt_d", "unit", "none"]
Decay = Literal["linear", "cosine", "none"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of one SAE."""

    arch: Architecture = "topk"
    """Architecture; batchtopk is saved as jumprelu."""
    n_features: int = 4096
    """Features to learn."""
    k: int = 32
    """Active features per row; for batchtopk on average."""
    k_start: int | None = None
    """Active features per row at the start; shrinks to k over `k_anneal_share` of the training."""
    k_anneal_share: float = 0.3
    """Share of the steps over which k_start shrinks to k."""
    batch_size: int = 1024
    """Rows per step."""
    epochs: float = 1.0
    """Passes over the rows of the source, unless `rows` is given."""
    rows: int | None = None
    """Rows to train on in all; goes through the source again where it holds fewer."""
    lr: float | None = None
    """Adam's peak learning rate; 1e-3 · √(2^14 / n_features), at most 2e-3, if not given. That is for a few million
    rows; for a hundred times as many, Gao et al. (2024) take a fifth of it."""
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
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK loss, which revives dead features; 0 leaves it out."""
    k_aux: int | None = None
    """Dead features per row that AuxK uses; half the width if not given."""
    dead_after: int | None = None
    """Rows without firing after which a feature is dead; a tenth of all rows, at most 10 million, if not given."""
    scaling: Scaling = "sqrt_d"
    """One scalar for all rows: `sqrt_d` makes E‖x‖ = √d, `unit` E‖x‖² = 1. Folded into the saved weights."""
    b_dec_init: BiasInit = "geometric_median"
    """Where the decoder bias starts."""
    apply_b_dec_to_input: bool = True
    """Whether the encoder sees x − b_dec."""
    encoder_dtype: EncoderDtype = "float32"
    """Precision of the dense product that chooses active features; `bfloat16` is faster on processors with matrix units
    for it. Codes and gradients are in float32 in any case."""
    ema_decay: float = 0.0
    """Above 0, the saved weights are an average over steps with this decay, from the first decay step on."""
    seed: int = 0
    """Seed of the initial weights."""
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

    def __post_init__(self) -> None:
        positive = ("batch_size", "epochs", "sample_rows", "heldout_rows", "checkpoint_every", "log_every")
        optional = ("rows", "lr", "k_aux", "dead_after")
        for name in (*positive, *(o for o in optional if getattr(self, o) is not None)):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} {value}", "it must be positive and finite", "set it above 0")
        for name in ("k_anneal_share", "warmup_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)}", "a share is from 0 to 1", "set it so")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}", "it must be from 0 to below 1", "set it so")
        if not self.clip_norm >= 0:
            raise UserError(f"clip_norm {self.clip_norm}", "it must not be negative", "set it to 0 or more")
        choices = {"arch": Architecture, "scaling": Scaling, "decay": Decay, "b_dec_init": BiasInit}
        choices |= {"encoder_dtype": EncoderDtype}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed.__args__:
                raise UserError(
                    f"{name} {getattr(self, name)!r}", f"it is one of {', '.join(allowed.__args__)}", "choose one"
                )
        self._architecture_config(self.dead_after or 0)

    def steps(self, rows_total: int) -> int:
        """Optimiser steps over a source with `rows_total` rows per epoch."""
        rows = self.rows if self.rows is not None else round(self.epochs * rows_total)
        return max(1, rows // self.batch_size)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr is not None else min(2e-3, 1e-3 * math.sqrt(2**14 / self.n_features))

    def build(self, d: int, steps: int) -> TrainableSAE:
        """The SAE to train on rows of width d."""
        dead_after = self.dead_after or min(10_000_000, max(1, steps * self.batch_size // 10))
        config = self._architecture_config(dead_after)
        if isinstance(config, BatchTopKConfig):
            return TrainableBatchTopK(config, d, seed=self.seed)
        return TrainableTopK(config, d, seed=self.seed)

    def _architecture_config(self, dead_after: int) -> TopKConfig | BatchTopKConfig:
        kind = BatchTopKConfig if self.arch == "batchtopk" else TopKConfig
        return kind(
            n_features=self.n_features,
            k=self.k,
            k_start=self.k_start,
            k_anneal_share=self.k_anneal_share,
            aux_coefficient=self.aux_coefficient,
            k_aux=self.k_aux,
            dead_after=dead_after,
            b_dec_init=self.b_dec_init,
            apply_b_dec_to_input=self.apply_b_dec_to_input,
            encoder_dtype=self.encoder_dtype,
        )
