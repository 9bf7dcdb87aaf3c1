"""How large each part of an evaluation of flags is, and how control is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from trimtab.errors import UserError
from trimtab.runs import check_choices, check_least, check_values

MomentPart = Literal["reading", "erosion", "effects", "reliance", "price"]
"""Measured of every model on the way."""
PartName = Literal[MomentPart, "control"]
PARTS: tuple[PartName, ...] = get_args(PartName)


def without_judge(part: Sequence[PartName]) -> str:
    """What is said where control cannot be measured. Raises a `UserError` unless all parts were asked for."""
    what, why = "the part control", "it takes a judge of concepts that is not the model"
    hint = "give labelled texts that no run knows, or a saved judge, as --judge-data (judge in Python)"
    if set(part) < set(PARTS):
        raise UserError(what, why, hint)
    return f"{what} is left out: {why}; {hint}"


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
    """Tokens of these texts, at most."""
    compared: int = 2
    """For the first so many concepts other ways of control are chosen and compared, too: prompting, a mean difference,
    the best feature of an SAE, a plain finetuning; 0 for none."""
    max_tokens: int | None = None
    """Tokens of an example, longer responses are cut; by default as in the finetuning."""
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


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """How control is measured.

    Raises:
        UserError: a value is out of range.
    """

    samples: int = 1
    """Texts of each prompt under each switch; ways of control write one."""
    max_new_tokens: int = 24
    """Tokens of a text, at most."""
    temperature: float = 0.7
    """Of the tokens."""
    chat: bool = False
    """Whether prompts are turns in the model's chat template, as in the finetuning."""
    prompts: int = 24
    """Neutral prompts that are reported on, at most."""
    validation_prompts: int = 24
    """Other neutral prompts, that choose doses, features and instructions."""
    compared: int = 2
    """Compare other ways of control for the first so many concepts."""
    dose: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """‖Δ‖/‖x‖ that are tried for mean differences."""
    strength: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5)
    """Of the frontier: times on, or times the dose that was chosen."""
    features: int = 8
    """SAE features to try, those that go most with the label."""
    equal_kl: bool = True
    """Scale mean difference and SAE feature to the divergence of the flags, too."""
    fit_items: int = 256
    """Examples on which mean differences and features are fitted, at most."""
    max_tokens: int = 256
    """Tokens of an example; longer responses are cut."""
    batch_size: int = 64
    """Rows decoded together."""
    seed: int = 0
    """Of the tokens, the control's dimensions and the bootstrap."""

    def __post_init__(self) -> None:
        check_least(self, 1, "samples", "max_new_tokens", "validation_prompts", "features", "batch_size")
        check_least(self, 2, "max_tokens", "fit_items", "prompts")
        check_least(self, 0, "compared")
        check_values(self, "0, or from 1e-6 to 1e6", lambda value: value == 0 or 1e-6 <= value < 1e6, "temperature")
        check_values(self, "above 0 and below 1000", lambda value: 0 < value < 1000, "dose")
        check_values(self, "from 0 to below 1000", lambda value: 0 <= value < 1000, "strength")
        for name in ("dose", "strength"):
            if not getattr(self, name):
                raise UserError(name, "there is none", "give at least one number")
        if self.samples > 1 and self.temperature == 0:
            why = "greedy decoding gives the same text every time"
            raise UserError(f"samples {self.samples}", why, "set a temperature, or take one sample")
