"""Causal erosion: whether a concept's direction outside the flags still makes a model write the concept.

A concept's direction is the difference of mean activations of responses that need it and of others, fitted on examples
that are not reported, with the flags' dimensions left out. Added at one layer, at an equal share of ‖x‖, to every token
that a response's token is chosen from, it raises the log-probability of responses that have the concept over that of
others, or no longer does. Later flags may react to it, and pass it on; so the effect is measured once more with the
flags above the layer held at what they were.
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
from torch.nn.utils.rnn import pad_sequence

from trimtab.flags.evaluation.harvest import PLACES, Harvest
from trimtab.flags.evaluation.measured import CHANGES, MOMENT, Measured, MomentRow, Part, Series, compared, curves
from trimtab.flags.evaluation.texts import LabelledTexts
from trimtab.flags.examples import LabelledBatch, batch_of
from trimtab.flags.loss import response_sums
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, RowDelta, Site, edited
from trimtab.lm.taps import Coordinates, Tap
from trimtab.lm.upper_layers import starting_at
from trimtab.runs.figures import plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import SIGNED, Column, Table
from trimtab.stats import Interval, Resampled, Resamples, number_text
from trimtab.stats.resamples import ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEAN = "mean"
"""Stands for the mean over concepts."""
FREE, HELD = "free", "held"
"""Flags above the layer react to the direction; they stay what they are without it."""


def concept_directions(
    flags: FlagSpec, residual: Float[Tensor, "2 N d"], labels: Bool[np.ndarray, "N C"]
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


def measured_pairs(labels: Bool[np.ndarray, "N C"], items: int) -> list[tuple[int, int]]:
    """Numbers of example and concept: of each concept the first examples that have it, and as many that lack it."""
    half = max(1, items // 2)
    return [(int(i), c) for c, on in enumerate(labels.T) for of in (on, ~on) for i in np.flatnonzero(of)[:half]]


@torch.no_grad()
def effect_values(
    model: LanguageModel,
    flags: FlagSpec,
    directions: Float[Tensor, "C d"],
    texts: LabelledTexts,
    harvested: Harvest,
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
        harvested: of these examples, with the inputs of the next layer.
        layer: after which directions are added.
        dose: length of what is added, as a share of ‖x‖.
        items: examples of each concept, half of which have it.
        batch_size: examples of a pass.
        progress: told of the pairs of example and concept done.

    Returns:
        For each concept, flags free and held, a value for each example, NaN where it was not measured.
    """
    found = {of: np.full(texts.labels.shape, np.nan) for of in (FREE, HELD)}
    pairs = sorted(measured_pairs(texts.labels, items), key=lambda pair: len(texts.tokens[pair[0]].ids))
    site, k = Site("resid_post", layer), len(flags.flat_dims)
    dims = torch.tensor(flags.flat_dims, device=model.device)
    above = [(i, at) for i, at in enumerate(flags.sites) if at.layer > layer]
    clean = (harvested.nats / harvested.n_tokens).numpy()
    for start in range(0, len(pairs), batch_size):
        rows, concepts = map(list, zip(*pairs[start : start + batch_size], strict=True))
        part = texts.take(rows)
        batch = batch_of(model, flags, part.examples, part.tokens)
        hidden, held = (
            pad_sequence([each[i] for i in rows], batch_first=True, padding_side="left").to(model.device)
            for each in (harvested.inputs[layer + 1], harvested.held)
        )
        push = _push(batch, hidden, directions[concepts].to(model.device), dose)
        stay = {at: Coordinates(dims, held[:, :, i, :k]) for i, at in above}
        for of, others in ((FREE, {}), (HELD, stay)):
            edits: dict[Site, Tap] = {site: lambda _x, push=push: push, **others}
            with starting_at(model, layer + 1, hidden), edited(model, edits):
                nats = response_sums(model, batch) / batch.answer.sum(dim=1)
            found[of][rows, concepts] = clean[rows] - nats.cpu().numpy()
        if progress:
            progress(len(rows))
    return [
        Measured({"concept": name, "flags": of}, values[:, i])
        for i, name in enumerate(flags.concepts)
        for of, values in found.items()
    ]


def _push(batch: LabelledBatch, x: Float[Tensor, "B T d"], directions: Float[Tensor, "B d"], dose: float) -> RowDelta:
    """Each row's direction at every token whose logits choose a token of the response."""
    at, time = batch.answer.roll(-1, dims=1).nonzero(as_tuple=True)  # the first place is never a response's
    size = dose * x[at, time].norm(dim=-1, keepdim=True)
    return RowDelta(at, time, size * directions[at].to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class DirectionEffect(MomentRow):
    """What adding concepts' directions does."""

    concept: str
    """`mean` for the mean over concepts."""
    flags: str
    """`free`, or `held` at what they are without the direction."""
    effect: Interval
    """Nats per token by which responses that have the concept gain over others."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Effects(Result):
    """Effects of concepts' directions outside the flags; 95% intervals over reported examples."""

    layer: int
    dose: float
    directions: tuple[DirectionEffect, ...]

    def means(self, flags: str) -> list[DirectionEffect]:
        """Over concepts, with flags free or held."""
        return [row for row in self.directions if (row.concept, row.flags) == (MEAN, flags)]

    def headline(self) -> str:
        free, held = ({row.moment.run: row for row in self.means(flags)} for flags in (FREE, HELD))
        said = [
            f"{run} {number_text(row.effect, SIGNED)}, with flags held {number_text(held[run].effect, SIGNED)}"
            for run, row in free.items()
        ]
        return (
            f"effect of concepts' directions outside the flags after layer {self.layer}, {self.dose:g}·‖x‖, in nats "
            f"per token: {'; '.join(said)}"
        )

    def tables(self) -> dict[str, Table]:
        scores = [Column("flags", "flags"), Column("effect", "effect", SIGNED, note="nats per token"), *CHANGES]
        caption = (
            "Gain in log-probability of responses with the concept minus that of others, when the difference of means, "
            "fitted on other examples without the flags' dimensions, is added at an equal share of ‖x‖. Flags held: "
            "above that layer they keep the values that they have without it, so that they pass nothing on."
        )
        last = {row.moment.run: row.moment.step for row in self.directions}
        rows = [row for row in self.directions if row.concept != MEAN and row.moment.step == last[row.moment.run]]
        concept = Column("concept", "concept", whole=True)
        return {
            "effects": Table(
                columns=[*MOMENT, *scores], rows=[row for row in self.directions if row.concept == MEAN],
                caption=caption,
            ),
            "by concept": Table(columns=[*MOMENT, concept, *scores], rows=rows),
        }  # fmt: skip

    def draw(self, ax: Axes) -> None:
        """Mean effect over steps, a curve for each run with flags free and one with flags held."""
        rows = [*self.means(FREE), *self.means(HELD)]
        plot_curves(ax, curves(rows, "effect", "{moment.run}, {flags}"), "nats per token", steps="step")


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

    def effects(part: Part) -> dict[tuple[str, str], Resampled]:
        labels = texts.labels.T.repeat(2, axis=0)
        each = {
            (str(row.key["concept"]), str(row.key["flags"])): _effect(row.values, on, resamples)
            for row, on in zip(part.rows, labels, strict=True)
        }
        means = {(MEAN, of): Resampled.mean([one for key, one in each.items() if key[1] == of]) for of in (FREE, HELD)}
        return means | each

    rows = [
        DirectionEffect(**row.fields, concept=row.key[0], flags=row.key[1], effect=row.value.interval)
        for row in compared(series, effects)
    ]
    return Effects(layer=layer, dose=dose, directions=tuple(rows))


def _effect(gain: NDArray[np.float64], on: NDArray[np.bool_], resamples: Resamples) -> Resampled:
    """Mean gain of examples that have the concept minus that of others."""
    known, values = np.isfinite(gain), np.nan_to_num(gain)
    return resamples.of(lambda w: ratio(values * on, known & on, w) - ratio(values * ~on, known & ~on, w))
