"""One model that is measured: what its parts share is computed once, when the first of them asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from trimtab.control.task_prompts import TaskPrompts
from trimtab.flags.evaluation.effects import concept_directions, effect_values
from trimtab.flags.evaluation.erosion import probe_values, subsets
from trimtab.flags.evaluation.harvest import PLACES, Harvest, harvest
from trimtab.flags.evaluation.measured import Measured
from trimtab.flags.evaluation.options import FlagEvaluationOptions, MomentPart
from trimtab.flags.evaluation.price import GeneralText, price_values
from trimtab.flags.evaluation.probes import PROBES
from trimtab.flags.evaluation.reading import reading_values
from trimtab.flags.evaluation.reliance import reliance_values
from trimtab.flags.evaluation.texts import EvaluationTexts
from trimtab.flags.evaluation.unassigned import unassigned_dims
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.runs import Meter


@dataclass(frozen=True, kw_only=True)
class MeasuredOn:
    """What every model of an evaluation is measured on."""

    texts: EvaluationTexts
    text: GeneralText | None
    task: TaskPrompts | None
    layers: tuple[int, ...]
    """That probes read."""
    effect_layer: int
    """After which directions are added."""
    options: FlagEvaluationOptions


class MeasuredModel:
    """A model with flags, or the original read at their places.

    Args:
        model: the model.
        flags: its flags.
        on: what it is measured on.
        meter: told of shares of parts.
    """

    def __init__(self, model: LanguageModel, flags: FlagSpec, on: MeasuredOn, meter: Meter) -> None:
        self.model, self.flags, self.on, self._meter = model, flags, on, meter
        self.unassigned = unassigned_dims(flags, on.options.seed)

    def measure(self, part: MomentPart) -> list[Measured]:
        """What a part measures, by its name."""
        return {
            "reading": self.reading, "erosion": self.erosion, "effects": self.effects, "reliance": self.reliance,
            "price": self.price,
        }[part]()  # fmt: skip

    @cached_property
    def harvested(self) -> tuple[Harvest, Harvest]:
        """Activations of the examples that are fitted on, and of those reported."""
        on = self.on
        layers = sorted({*on.layers, on.effect_layer})
        fitted, reported = on.texts.fitted, on.texts.reported
        return tuple(
            harvest(
                self.model, self.flags, self.unassigned, texts, layers, batch_size=on.options.batch_size,
                progress=self._share_of(len(fitted) + len(reported)),
            )
            for texts in (fitted, reported)
        )  # type: ignore[return-value]  # fmt: skip

    def reading(self) -> list[Measured]:
        return reading_values(self.flags, self.unassigned, self.harvested[1])

    def erosion(self) -> list[Measured]:
        on = self.on
        fitted, reported = (
            each._replace(residual={layer: each.residual[layer] for layer in on.layers}) for each in self.harvested
        )
        fits = len(on.layers) * len(PLACES) * len(PROBES) * len(subsets(self.flags, self.unassigned))
        return probe_values(
            self.flags, self.unassigned, fitted, reported, on.texts.fitted.labels, seed=on.options.seed,
            progress=self._share_of(fits),
        )  # fmt: skip

    def effects(self) -> list[Measured]:
        on, options = self.on, self.on.options
        fitted = self.harvested[0].residual[on.effect_layer]
        directions = concept_directions(self.flags, fitted, on.texts.fitted.labels)
        return effect_values(
            self.model, self.flags, directions, on.texts.reported, layer=on.effect_layer, dose=options.dose,
            items=options.effect_items, batch_size=options.batch_size,
            progress=self._share_of(len(on.texts.reported)),
        )  # fmt: skip

    def reliance(self) -> list[Measured]:
        on, options = self.on, self.on.options
        texts = on.texts.reported.first(options.reliance_items)
        mean: torch.Tensor = self.harvested[0].held[PLACES.index("response")].mean(0)
        return reliance_values(
            self.model, self.flags, self.unassigned, mean, texts, batch_size=options.batch_size,
            progress=self._share_of(len(texts)),
        )  # fmt: skip

    def price(self) -> list[Measured]:
        assert self.on.text is not None
        return price_values(self.model, self.on.text, self.on.task, progress=self._share_of(len(self.on.text)))

    def _share_of(self, total: int) -> Callable[[int], None]:
        return lambda done: self._meter.advance(done / total)
