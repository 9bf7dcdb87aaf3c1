"""One model that is measured: what its parts share is computed once, when the first of them asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from jaxtyping import Float

from trimtab.control.task_prompts import TaskPrompts
from trimtab.flags.evaluation.effects import concept_directions, effect_values, measured_pairs
from trimtab.flags.evaluation.erosion import probe_values, probed
from trimtab.flags.evaluation.harvest import PLACES, Harvest, harvest
from trimtab.flags.evaluation.measured import Measured
from trimtab.flags.evaluation.options import FlagEvaluationOptions, MomentPart
from trimtab.flags.evaluation.price import GeneralText, price_values
from trimtab.flags.evaluation.reading import reading_values
from trimtab.flags.evaluation.reliance import reliance_values
from trimtab.flags.evaluation.texts import EvaluationTexts
from trimtab.flags.evaluation.unassigned import VARIANCE_ITEMS, matched_dims, unassigned_draws
from trimtab.flags.placing import flag_sites, measure_residuals
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
    original: LanguageModel
    first_layer: int
    """The first with flags of all finetunings."""
    options: FlagEvaluationOptions

    @cached_property
    def variance(self) -> Float[np.ndarray, " d"]:
        """Of the original's dimensions where there are flags, by which those of controls are chosen."""
        rows = [row.ids for row in self.texts.fitted.first(VARIANCE_ITEMS).tokens]
        sites = flag_sites(self.original, self.first_layer)
        return measure_residuals(self.original, rows, sites).relative_variance.numpy()


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

    @cached_property
    def draws(self) -> list[FlagSpec]:
        """Dimensions of controls."""
        return unassigned_draws(self.flags, self.on.variance, self.on.options.seed)

    @cached_property
    def harvested(self) -> tuple[Harvest, Harvest]:
        """Forward passes of the examples that are fitted on, and of those reported."""
        on = self.on
        layers = sorted({*on.layers, on.effect_layer})
        fitted, reported = on.texts.fitted, on.texts.reported
        others = matched_dims(self.flags, on.variance)
        kept = sorted({self.flags.first_layer, on.effect_layer + 1})
        read = partial(
            harvest, self.model, self.flags, others, layers=layers, batch_size=on.options.batch_size,
            progress=self._share_of(len(fitted) + len(reported)),
        )  # fmt: skip
        return read(fitted), read(reported, inputs=kept)

    def measure(self, part: MomentPart) -> list[Measured]:
        """What a part measures, by its name."""
        on, options, model, flags = self.on, self.on.options, self.model, self.flags
        if part == "price":
            assert on.text is not None
            return price_values(model, on.text, on.task, progress=self._share_of(len(on.text)))
        fitted, reported = self.harvested
        labels, texts, batch_size = on.texts.fitted.labels, on.texts.reported, options.batch_size
        if part == "reading":
            return reading_values(flags, self.draws, reported)
        if part == "erosion":
            sets = probed(flags, self.draws, labels, options.seed)
            share = self._share_of(len(sets) * len(on.layers) * len(PLACES))
            return probe_values(sets, fitted, reported, on.layers, seed=options.seed, progress=share)
        if part == "effects":
            directions = concept_directions(flags, fitted.residual[on.effect_layer], labels)
            share = self._share_of(len(measured_pairs(texts.labels, options.effect_items)))
            return effect_values(
                model, flags, directions, texts, reported, layer=on.effect_layer, dose=options.dose,
                items=options.effect_items, batch_size=batch_size, progress=share,
            )  # fmt: skip
        few = texts.first(options.reliance_items)
        share = self._share_of(len(few))
        return reliance_values(
            model, flags, fitted, reported, few, seed=options.seed, batch_size=batch_size, progress=share
        )

    def _share_of(self, total: int) -> Callable[[int], None]:
        return lambda done: self._meter.advance(done / total)
