"""How large each part of an evaluation of flags is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from trimtab.errors import UserError
from trimtab.runs import check_choices, check_least, check_values

MomentPart = Literal["reading", "erosion", "effects", "reliance", "price"]
"""Measured of every model on the way."""
PartName = Literal[MomentPart, "control"]
PARTS: tuple[PartName, ...] = get_args(PartName)


@dataclass(frozen=True, kw_only=True)
class FlagEvaluationOptions:
    """What is measured, and on how much.

    Raises:
        UserError: a value is out of range.
    """

    part: tuple[PartName, ...] = PARTS
    """What to measure: `reading` (what flags say), `erosion` (probes of the rest), `effects` (directions outside the
    flags), `reliance` (the cost of taking flags away), `price` (general text and an unrelated task), `control` (what
    switches decide, at the end of each run)."""
    items: int = 96
    """Held-out examples that reading and probes are reported on, at most; no more than a third of the documents or
    prompts."""
    fit_items: int = 192
    """Other held-out examples that probes, directions and means are fitted on, at most."""
    layer: tuple[int, ...] = ()
    """Layers after which probes read; five of those with flags, evenly spaced, by default."""
    effect_layer: int | None = None
    """Layer after which directions are added; half the depth by default."""
    dose: float = 0.2
    """Length of an added direction, as a share of ‖x‖."""
    effect_items: int = 12
    """Examples of each concept that its direction is tried on, half of which have it."""
    reliance_items: int = 24
    """Examples on which flags are taken away, at most."""
    text_tokens: int = 3072
    """Tokens of general text."""
    context: int = 128
    """Tokens of a sequence of general text."""
    task_items: int = 64
    """Items of the unrelated task, at most."""
    samples: int = 1
    """Texts of each prompt under each switch."""
    text_length: int = 24
    """Tokens of these texts."""
    compared: int = 0
    """Concepts for which other ways of control are chosen and compared, too: prompting, a mean difference, the best
    feature of an SAE, a plain finetuning."""
    max_tokens: int = 128
    """Tokens of an example; longer responses are cut."""
    batch_size: int = 8
    """Examples of a forward pass."""
    n_resamples: int = 1000
    """Bootstrap samples of the reported prompts."""
    seed: int = 0
    """Of the dimensions of controls, shuffled labels, networks and the bootstrap."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.part:
            raise UserError("part", "there is none", f"choose among {', '.join(PARTS)}")
        check_least(
            self,
            1,
            "reliance_items",
            "text_tokens",
            "task_items",
            "batch_size",
            "n_resamples",
            "fit_items",
            "items",
            "samples",
            "text_length",
        )
        check_least(self, 2, "context", "max_tokens", "effect_items")
        check_least(self, 0, "layer", "effect_layer", "compared")
        check_values(self, "above 0 and below 10", lambda dose: 0 < dose < 10, "dose")
