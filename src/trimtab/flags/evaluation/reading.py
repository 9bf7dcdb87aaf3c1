"""Reading: whether each flag says what a response needs, site by site, before and while the response is written.

A flag reads on where the mean of h/t over its dimensions is above one half. At the last prompt token nothing of the
response has been seen; over the response's tokens the text gives the concept away. Controls: shuffled labels, and the
same reading of dimensions that are no flag's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab.flags.evaluation.harvest import PLACES, Harvest
from trimtab.flags.evaluation.measured import MOMENT, Measured, Moment, Series
from trimtab.flags.evaluation.texts import LabelledTexts
from trimtab.flags.measuring import READS_ON
from trimtab.flags.spec import FlagSpec
from trimtab.lm import Site
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import INTERVAL, Column, Table
from trimtab.stats import Interval, Resampled, Resamples, number_text
from trimtab.stats.resamples import auc, column_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL = "all"
"""Stands for the mean over sites."""


def reading_values(flags: FlagSpec, unassigned: FlagSpec, harvested: Harvest) -> list[Measured]:
    """How strongly each flag is on in each example, `[N, C]` flat: at each site and on average, at both places."""
    found: list[Measured] = []
    for dims, spec, held in (("flags", flags, harvested.held), ("unassigned", unassigned, harvested.unassigned)):
        strength = strengths(spec, held)  # [2, N, S, C]
        for place, at in zip(PLACES, strength, strict=True):
            for site, values in zip(spec.sites, at.unbind(1), strict=True):
                found.append(Measured({"site": str(site), "place": place, "dims": dims}, _flat(values)))
            found.append(Measured({"site": ALL, "place": place, "dims": dims}, _flat(at.mean(1))))
    return found


def strengths(spec: FlagSpec, held: torch.Tensor) -> torch.Tensor:
    """Mean of h/t over each concept's dimensions.

    Args:
        spec: says which dimensions are whose, and the targets.
        held: `[..., S, K]`.

    Returns:
        `[..., S, C]`: 0 off, 1 on.
    """
    target = torch.tensor(list(spec.targets.values()))[:, None]
    owner = torch.nn.functional.one_hot(torch.tensor(spec.concept_of), len(spec.concepts)).float()
    return (held / target) @ (owner / owner.sum(0))


def _flat(values: torch.Tensor) -> NDArray[np.float64]:
    return values.double().flatten().numpy()


@dataclass(frozen=True, kw_only=True)
class SiteReading:
    """How well the flags read at one site, mean over concepts."""

    moment: Moment
    site: str
    """`all` for the mean over sites."""
    layer: int | None
    kind: str
    place: str
    """`prompt`: the last prompt token; `response`: the mean over the response's tokens."""
    accuracy: Interval
    """Mean of the shares read right of those that need the concept and of the others: 0.5 is chance."""
    auc: Interval
    """How often an example that needs the concept reads higher than one that does not."""
    shuffled: Interval
    """The same with the examples' labels exchanged."""
    unassigned: Interval
    """AUC of as many dimensions that are no flag's."""
    unassigned_accuracy: Interval


@dataclass(frozen=True, kw_only=True)
class ConceptReading:
    """How well one flag reads, mean over sites."""

    moment: Moment
    concept: str
    place: str
    accuracy: Interval
    auc: Interval


@dataclass(frozen=True, kw_only=True, repr=False)
class Reading(Result):
    """What flags say of held-out examples."""

    sites: tuple[SiteReading, ...]
    """Of every moment over all sites, and site by site of each run's last."""
    concepts: tuple[ConceptReading, ...]
    """Of each run's last moment."""

    @property
    def whole(self) -> list[SiteReading]:
        """Over all sites."""
        return [row for row in self.sites if row.site == ALL]

    def last(self, place: str) -> list[SiteReading]:
        """Over all sites, of each run's last moment."""
        found = {row.moment.run: row for row in self.whole if row.place == place}
        return list(found.values())

    def headline(self) -> str:
        said = [
            f"{row.moment.run} {number_text(row.auc, INTERVAL)}, at the last prompt token "
            f"{number_text(prompt.auc, INTERVAL)}"
            for row, prompt in zip(self.last("response"), self.last("prompt"), strict=True)
        ]
        return f"AUC of flags over responses: {'; '.join(said)}"

    def tables(self) -> dict[str, Table]:
        scores = [
            Column("accuracy", "accuracy", INTERVAL),
            Column("AUC", "auc", INTERVAL),
            Column("labels shuffled", "shuffled", INTERVAL, spare=1),
            Column("unassigned dimensions", "unassigned", INTERVAL, note="AUC"),
            Column("accuracy there", "unassigned_accuracy", INTERVAL, spare=2),
        ]
        caption = (
            "Mean over concepts; chance is 0.5. prompt: at the last prompt token, which sees nothing of the response. "
            "response: mean over its tokens, whose text gives the concept away. 95% intervals over reported prompts."
        )
        at = [Column("place", "place"), Column("site", "site", whole=True)]
        concepts = [*MOMENT, Column("concept", "concept", whole=True), at[0], *scores[:2]]
        return {
            "reading": Table(columns=[*MOMENT, at[0], *scores], rows=self.whole, caption=caption),
            "by concept": Table(columns=concepts, rows=self.concepts),
            "by site": Table(
                columns=[*MOMENT, *at, *scores], rows=[row for row in self.sites if row.site != ALL], caption=caption
            ),
        }

    def draw(self, ax: Axes) -> None:
        """AUC by layer after the MLP, of each run's last moment, at both places."""
        found: dict[str, list[SiteReading]] = {}
        for row in self.sites:
            if row.kind == "resid_post":
                found.setdefault(f"{row.moment.run}, {row.place}", []).append(row)
        curves = [
            Curve(label, [row.layer or 0 for row in rows], [row.auc.estimate for row in rows])
            for label, rows in found.items()
        ]
        plot_curves(ax, curves, "AUC", steps="layer")


def reading_result(
    series: Sequence[Series], texts: LabelledTexts, flags: Mapping[str, FlagSpec], resamples: Resamples, seed: int
) -> Reading:
    """Intervals of what `reading_values` measured.

    Args:
        series: of each run.
        texts: the examples reported.
        flags: of each run, by its name.
        resamples: of the examples.
        seed: of the shuffled labels.
    """
    labels = texts.labels
    mixed = labels[np.random.default_rng(seed).permutation(len(labels))]
    sites: list[SiteReading] = []
    concepts: list[ConceptReading] = []
    for one in series:
        spec = flags[one.run]
        for moment, part in zip(one.moments, one.parts, strict=True):
            last = moment is one.moments[-1]
            for place in PLACES:
                for name in [ALL, *map(str, spec.sites if last else ())]:
                    own, other = (
                        part.of(site=name, place=place, dims=dims).reshape(labels.shape)
                        for dims in ("flags", "unassigned")
                    )
                    site = None if name == ALL else Site.parse(name)
                    found = SiteReading(
                        moment=moment,
                        site=name,
                        layer=None if site is None else site.layer,
                        kind="" if site is None else site.kind,
                        place=place,
                        accuracy=mean_accuracy(own, labels, resamples).interval,
                        auc=mean_auc(own, labels, resamples).interval,
                        shuffled=mean_auc(own, mixed, resamples).interval,
                        unassigned=mean_auc(other, labels, resamples).interval,
                        unassigned_accuracy=mean_accuracy(other, labels, resamples).interval,
                    )
                    sites.append(found)
                own = part.of(site=ALL, place=place, dims="flags").reshape(labels.shape)
                for i, concept in enumerate(spec.concepts if last else ()):
                    column = slice(i, i + 1)
                    concepts.append(
                        ConceptReading(
                            moment=moment,
                            concept=concept,
                            place=place,
                            accuracy=mean_accuracy(own[:, column], labels[:, column], resamples).interval,
                            auc=mean_auc(own[:, column], labels[:, column], resamples).interval,
                        )
                    )
    return Reading(sites=tuple(sites), concepts=tuple(concepts))


def mean_auc(scores: NDArray[np.float64], labels: NDArray[np.bool_], resamples: Resamples) -> Resampled:
    """AUC, mean over concepts.

    Args:
        scores: `[N, C]`.
        labels: `[N, C]`.
        resamples: of the examples.
    """
    pairs = list(zip(scores.T, labels.T, strict=True))
    return resamples.of(lambda w: column_mean(np.stack([auc(score, label, w) for score, label in pairs], axis=-1)))


def mean_accuracy(strength: NDArray[np.float64], labels: NDArray[np.bool_], resamples: Resamples) -> Resampled:
    """Mean over concepts of the mean of both classes' shares of right readings.

    Args:
        strength: `[N, C]`.
        labels: `[N, C]`.
        resamples: of the examples.
    """
    reads = strength > READS_ON

    def shares(w: NDArray[np.float64]) -> NDArray[np.float64]:
        right = [
            (w @ ((reads == labels) & kind).astype(np.float64)) / (w @ kind.astype(np.float64))
            for kind in (labels, ~labels)
        ]
        return column_mean((right[0] + right[1]) / 2)

    return resamples.of(shares)
