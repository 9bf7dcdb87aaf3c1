"""How a model is finetuned with flags."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trimtab.errors import UserError
from trimtab.flags.dividing import HOLDOUT
from trimtab.flags.loss import LOSSES
from trimtab.flags.placing import check_enough, dims_of_each
from trimtab.runs import check_choices, check_least, check_values

LR = {"full": 3e-5, "lora": 5e-4}
"""Learning rates unless told otherwise: the paper's for all weights, a common one for LoRA."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """What is trained: all weights, or low-rank additions to some (LoRA, Hu et al. 2021, arXiv 2106.09685, by PEFT)."""

    adapt: Literal["full", "lora"] = "full"
    """Train all weights (full), or low-rank additions to those of some modules, saved as a PEFT adapter (lora)."""
    lora_rank: int = 8
    """Rank of LoRA's additions."""
    lora_alpha: float | None = None
    """LoRA's alpha: additions are multiplied by alpha / rank; twice the rank by default."""
    lora_modules: tuple[str, ...] = ()
    """Modules that LoRA adds to, by the ends of their names; all linear ones of attention and MLP by default."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, 1, "lora_rank")
        check_values(self, "positive and finite", lambda value: 0 < value < math.inf, "lora_alpha")
        if self.adapt == "full":
            usual = LoraOptions(adapt="lora")
            for name in ("lora_rank", "lora_alpha", "lora_modules"):
                if getattr(self, name) != getattr(usual, name):
                    raise UserError(f"{name} {getattr(self, name)}", "all weights are trained", "say adapt lora, too")


@dataclass(frozen=True, kw_only=True)
class FlagTraining(LoraOptions):
    """How a model is finetuned. Optimiser and clipping are the paper's.

    Raises:
        UserError: a value is out of range.
    """

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 8
    """Examples per step, of all processes together."""
    max_tokens: int = 256
    """Tokens of an example; longer responses are cut."""
    chat: bool = False
    """Whether prompts are turns of a user and responses those of the model, in its chat template."""
    lr: float | None = None
    """AdamW's learning rate after warm-up; 3e-5 by default, 5e-4 for LoRA."""
    warmup_share: float = 0.02
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """AdamW's."""
    clip_norm: float = 5.0
    """Largest norm of the gradient of all weights; 0 does not clip."""
    loss: str = "normalised_l1"
    """Form of the flags' loss: normalised_l1, l1, squared or normalised_squared."""
    flag_weight: float = 1.0
    """What the curriculum's λ is multiplied by."""
    flag_lr_factor: float = 10.0
    """How many times lr those rows of weights learn at that write the flags' dimensions, in every curriculum."""
    holdout: float = HOLDOUT
    """Share of prompts and of documents held out, unless held-out examples are given. Examples whose prompt and
    document do not agree are left out, and counted; there are none at the `holdout` that `flags import` was given."""
    seed: int = 0
    """Seed of the order of examples, of forced steps and of where LoRA begins."""
    autocast: bool = False
    """Compute matrix products in bfloat16; weights and residual stream stay in float32."""
    gradient_checkpointing: bool = False
    """Keep no activations inside of layers, and compute them again for the gradients: less memory, more time."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """What trained weights are rounded to at the end, before the model is measured and saved."""
    snapshots: int = 0
    """Models kept while training goes on, evenly over the steps, the last of them the result; 0 keeps the result."""
    log_every: int = 10
    """Steps between lines of metrics."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last two are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "steps", "batch_size", "log_every", "checkpoint_every")
        check_least(self, 2, "max_tokens")
        check_least(self, 0, "snapshots")
        check_values(
            self, "positive and finite", lambda value: 0 < value < math.inf, "lr", "flag_weight", "flag_lr_factor"
        )
        check_values(self, "from 0 to below 1", lambda value: 0 <= value < 1, "warmup_share", "holdout")
        check_values(self, "at least 0 and finite", lambda value: 0 <= value < math.inf, "weight_decay", "clip_norm")
        if self.loss not in LOSSES:
            raise UserError(f"loss {self.loss!r}", f"it is one of {', '.join(LOSSES)}", "choose one")
        if self.snapshots > self.steps:
            raise UserError(f"snapshots {self.snapshots}", f"there are {self.steps} steps", "ask for fewer")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step."""
        warmup = round(self.warmup_share * self.steps)
        peak = LR[self.adapt] if self.lr is None else self.lr
        return peak * min(1.0, (step + 1) / max(warmup, 1))

    @property
    def snapshot_steps(self) -> frozenset[int]:
        """Steps after which a snapshot is kept; the last step is not among them, since the result is kept anyway."""
        return frozenset(round(i * self.steps / self.snapshots) for i in range(1, self.snapshots))


@dataclass(frozen=True, kw_only=True)
class FlagPlacing:
    """Where flags go, as `place_flags` takes it; dimensions as texts."""

    dims: tuple[str, ...] = ("16",)
    """Dimensions in all, spread over the concepts by lowest variance; or those of each, like sea=3,17 war=8."""
    from_layer: int | None = None
    """First layer with flags; 5/32 of the depth by default."""
    ramp: Literal["norms", "paper"] = "norms"
    """How "on" grows with depth: by the model's own norms, or 0.25 per layer as in the paper."""
    ramp_scale: float = 1.0
    """How many usual coordinates "on" is as large as, where the ramp is by norms."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, 0, "from_layer")
        check_values(self, "positive and finite", lambda value: 0 < value < math.inf, "ramp_scale")
        if self.ramp == "paper" and self.ramp_scale != 1:
            raise UserError(f"ramp_scale {self.ramp_scale}", "the paper's ramp has none", "leave it out, or use norms")

    def dims_of(self, concepts: tuple[str, ...]) -> int | dict[str, list[int]]:
        """What `place_flags` takes as `dims`.

        Raises:
            UserError: the texts are neither one number nor numbers of every concept, or too few for the concepts.
        """
        hint = "give one number, or those of each concept like sea=3,17 war=8"
        if len(self.dims) == 1 and "=" not in self.dims[0]:
            return check_enough(_number(self.dims[0], hint), concepts)
        found: dict[str, list[int]] = {}
        for text in self.dims:
            name, equals, numbers = text.rpartition("=")
            if not equals:
                raise UserError(f"dims {text!r}", "it names no concept", hint)
            if name in found:
                raise UserError(f"dimensions of {name!r}", "they are given twice", "give them once")
            found[name] = [_number(part, hint) for part in numbers.split(",")]
        dims_of_each(concepts, found)
        return found


def _number(text: str, hint: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"dims {text!r}", "it is no whole number", hint)
    return int(text)
