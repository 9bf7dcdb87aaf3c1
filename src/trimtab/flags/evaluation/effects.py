"""Causal erosion: whether a concept's direction outside the flags still makes a model write the concept.

A concept's direction is the difference of mean activations of prompts that need it and of others, fitted on prompts
that are not reported, with the flags' dimensions left out. Added at one layer, at an equal share of ‖x‖, to every token
that a response's token is chosen from, it raises the log-probability of responses that have the concept over that of
others, or no longer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from trimtab.flags.evaluation.harvest import PLACES
from trimtab.flags.evaluation.measured import MOMENT, Measured, Moment, Series, plain_parts
from trimtab.flags.evaluation.texts import LabelledTexts
from trimtab.flags.examples import LabelledBatch, batch_of
from trimtab.flags.loss import response_loss
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, RowDelta, Site, TokenBatch, capture, edited
from trimtab.lm.upper_layers import starting_at
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import SIGNED, Column, Table
from trimtab.stats import Interval, Resampled, Resamples, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEAN = "mean"
"""Stands for the mean over concepts."""


def concept_directions(
    flags: FlagSpec, residual: Float[Tensor, "2 N d"], labels: Bool[NDArray[np.bool_], "N C"]
) -> Float[Tensor, "C d"]:
    """Unit differences of means over responses' tokens, 0 in the flags' dimensions.

    Args:
        flags: their dimensions are left out.
        residual: activations at both places.
        labels: which examples have which concepts.
    """
    x, having = residual[PLACES.index("response")].double(), torch.from_numpy(labels.T)
    found = torch.stack([x[on].mean(0) - x[~on].mean(0) for on in having])
    found[:, flags.flat_dims] = 0
    return (found / found.norm(dim=1, keepdim=True).clamp_min(1e-30)).float()


@torch.no_grad()
def effect_values(
    model: LanguageModel,
    flags: FlagSpec,
    directions: Float[Tensor, "C d"],
    texts: LabelledTexts,
    *,
    layer: int,
    dose: float,
    items: int,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """By how much each concept's direction raises the log-probability of responses, in nats per token.

    Args:
        model: the model.
        flags: name the concepts.
        directions: of each concept, unit rows.
        texts: examples.
        layer: after which directions are added.
        dose: length of what is added, as a share of ‖x‖.
        items: examples of each concept, half of which have it.
        batch_size: examples of a pass.
        progress: told of the examples done.

    Returns:
        For each concept a value for each example, NaN where it was not measured.
    """
    half = max(1, items // 2)
    measured = np.zeros_like(texts.labels)
    for i, on in enumerate(texts.labels.T):
        for kind in (on, ~on):
            measured[np.flatnonzero(kind)[:half], i] = True
    found = np.full(texts.labels.shape, np.nan)
    site = Site("resid_post", layer)
    used = texts.take(np.flatnonzero(measured.any(axis=1)).tolist())
    numbers = np.flatnonzero(measured.any(axis=1))
    for rows in used.by_length(batch_size):
        part = used.take(rows)
        batch = batch_of(model, flags, part.examples, part.tokens)
        hidden = capture(model, batch.tokens, [site])[site]
        with starting_at(model, layer + 1, hidden):
            clean = _per_token(model, batch)
        for i, direction in enumerate(directions.to(model.device)):
            chosen = np.flatnonzero(measured[numbers[rows], i])
            if not len(chosen):
                continue
            some = _rows_of(batch, chosen.tolist())
            change = _push(some, hidden[chosen], direction, dose)
            with starting_at(model, layer + 1, hidden[chosen]), edited(model, {site: lambda _x, push=change: push}):
                found[numbers[rows][chosen], i] = clean[chosen] - _per_token(model, some)
        if progress:
            progress(len(rows))
    return [Measured({"concept": name}, found[:, i]) for i, name in enumerate(flags.concepts)]


def _per_token(model: LanguageModel, batch: LabelledBatch) -> NDArray[np.float64]:
    """Cross-entropy of each example's response, nats per token."""
    n = batch.answer.sum(dim=1).tolist()
    return np.array([float(row.double().mean()) for row in response_loss(model, batch).split(n)])


def _rows_of(batch: LabelledBatch, rows: list[int]) -> LabelledBatch:
    tokens = TokenBatch(batch.tokens.ids[rows], batch.tokens.lengths[rows], batch.tokens.padded)
    return LabelledBatch(tokens, batch.answer[rows], batch.labels[rows])


def _push(batch: LabelledBatch, x: Float[Tensor, "B T d"], direction: Float[Tensor, " d"], dose: float) -> RowDelta:
    """The direction at every token whose logits choose a token of the response."""
    at, time = batch.answer.roll(-1, dims=1).nonzero(as_tuple=True)  # the first place is never a response's
    size = dose * x[at, time].norm(dim=-1, keepdim=True)
    return RowDelta(at, time, size * direction.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class DirectionEffect:
    """What adding concepts' directions does."""

    moment: Moment
    concept: str
    """`mean` for the mean over concepts."""
    effect: Interval
    """Nats per token by which responses that have the concept gain over others."""
    change: Interval | None
    """Since step 0."""
    beyond_plain: Interval | None
    """Above that of the plain finetuning at the same step; None where there is none."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Effects(Result):
    """Effects of concepts' directions outside the flags; 95% intervals over reported prompts."""

    layer: int
    dose: float
    directions: tuple[DirectionEffect, ...]

    @property
    def means(self) -> list[DirectionEffect]:
        """Over concepts."""
        return [row for row in self.directions if row.concept == MEAN]

    def headline(self) -> str:
        last = {row.moment.run: row for row in self.means}
        said = [f"{run} {number_text(row.effect, SIGNED)}" for run, row in last.items()]
        return (
            f"effect of concepts' directions outside the flags after layer {self.layer}, {self.dose:g}·‖x‖, in nats "
            f"per token: {'; '.join(said)}"
        )

    def tables(self) -> dict[str, Table]:
        scores = [
            Column("effect", "effect", SIGNED, note="nats per token"),
            Column("since step 0", "change", SIGNED),
            Column("beyond plain", "beyond_plain", SIGNED, note="equal steps", spare=1),
        ]
        caption = (
            "Gain in log-probability of responses with the concept minus that of others, when the difference of means, "
            "fitted on other prompts without the flags' dimensions, is added at an equal share of ‖x‖."
        )
        last = {row.moment.run: row.moment.step for row in self.directions}
        rows = [row for row in self.directions if row.concept != MEAN and row.moment.step == last[row.moment.run]]
        concept = Column("concept", "concept", whole=True)
        return {
            "effects": Table(columns=[*MOMENT, *scores], rows=self.means, caption=caption),
            "by concept": Table(columns=[*MOMENT, concept, *scores], rows=rows),
        }

    def draw(self, ax: Axes) -> None:
        """Mean effect over steps, a curve for each run."""
        found: dict[str, list[DirectionEffect]] = {}
        for row in self.means:
            found.setdefault(row.moment.run, []).append(row)
        curves = [
            Curve(run, [r.moment.step for r in rows], [r.effect.estimate for r in rows]) for run, rows in found.items()
        ]
        plot_curves(ax, curves, "nats per token", steps="step")


def effects_result(
    series: Sequence[Series], texts: LabelledTexts, resamples: Resamples, *, layer: int, dose: float
) -> Effects:
    """Intervals of what `effect_values` measured.

    Args:
        series: of each run.
        texts: the examples reported.
        resamples: of them.
        layer, dose: what was added.
    """

    def of(rows: Sequence[Measured]) -> dict[str, Resampled]:
        each = {
            str(row.key["concept"]): _effect(row.values, on, resamples)
            for row, on in zip(rows, texts.labels.T, strict=True)
        }
        return {MEAN: Resampled.mean(list(each.values())), **each}

    found: list[DirectionEffect] = []
    for one in series:
        beside = plain_parts(one, series)
        first = of(one.parts[0].rows)
        for moment, part in zip(one.moments, one.parts, strict=True):
            other = of(beside[moment.step].rows) if moment.step in beside else None
            for concept, value in of(part.rows).items():
                found.append(
                    DirectionEffect(
                        moment=moment,
                        concept=concept,
                        effect=value.interval,
                        change=(value - first[concept]).interval if moment.step else None,
                        beyond_plain=(value - other[concept]).interval if other and moment.step else None,
                    )
                )
    return Effects(layer=layer, dose=dose, directions=tuple(found))


def _effect(gain: NDArray[np.float64], on: NDArray[np.bool_], resamples: Resamples) -> Resampled:
    """Mean gain of examples that have the concept minus that of others."""
    known = np.isfinite(gain)
    values = np.where(known, gain, 0)

    def of(w: NDArray[np.float64]) -> NDArray[np.float64]:
        means = [(w @ (values * kind)) / (w @ (1.0 * (known & kind))) for kind in (on, ~on)]
        return means[0] - means[1]

    return resamples.of(of)
