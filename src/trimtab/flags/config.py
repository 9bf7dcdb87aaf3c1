"""How a model is finetuned with flags."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.errors import UserError
from trimtab.flags.loss import LOSSES
from trimtab.runs import check_least, check_values


@dataclass(frozen=True, kw_only=True)
class FlagTraining:
    """How a model is finetuned. Optimiser and clipping are the paper's.

    Raises:
        UserError: a value is out of range.
    """

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 8
    """Examples per step."""
    max_tokens: int = 256
    """Tokens of an example; longer responses are cut."""
    chat: bool = False
    """Whether prompts are turns of a user and responses those of the model, in its chat template."""
    lr: float = 3e-5
    """AdamW's learning rate after warm-up."""
    warmup_share: float = 0.02
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """AdamW's."""
    clip_norm: float = 5.0
    """Largest norm of the gradient of all weights; 0 does not clip."""
    loss: str = "normalised_l1"
    """Form of the flags' loss, by a name in `LOSSES`."""
    holdout: float = 0.1
    """Share of the examples held out, unless held-out ones are given."""
    seed: int = 0
    """Seed of the order of examples and of forced steps."""
    log_every: int = 10
    """Steps between lines of metrics."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last two are kept."""

    def __post_init__(self) -> None:
        check_least(self, 1, "steps", "batch_size", "log_every", "checkpoint_every")
        check_least(self, 2, "max_tokens")
        check_values(self, "positive and finite", lambda value: 0 < value < math.inf, "lr")
        check_values(self, "from 0 to below 1", lambda value: 0 <= value < 1, "warmup_share", "holdout")
        check_values(self, "at least 0 and finite", lambda value: 0 <= value < math.inf, "weight_decay", "clip_norm")
        if self.loss not in LOSSES:
            raise UserError(f"loss {self.loss!r}", f"it is one of {', '.join(LOSSES)}", "choose one")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step."""
        warmup = round(self.warmup_share * self.steps)
        return self.lr * min(1.0, (step + 1) / max(warmup, 1))
