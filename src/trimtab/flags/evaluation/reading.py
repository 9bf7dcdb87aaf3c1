"""Reading: whether each flag says what a response needs, site by site, before and while the response is written.

A flag reads on where the mean of h/t over its dimensions is above one half. At the last prompt token nothing of the
response has been seen: where the prompt names no concept, all that a flag can say is a guess. Over the response's
tokens the text gives the concept away. Control: the same reading of dimensions that are no flag's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab.flags.data.prompts import names_one
from trimtab.flags.evaluation.control_prompts import described
from trimtab.flags.evaluation.harvest import PLACES, Harvest
from trimtab.flags.evaluation.measured import MOMENT, Measured, Moment, Series, curves
from trimtab.flags.evaluation.texts import LabelledTexts
from trimtab.flags.loss import read_strengths
from trimtab.flags.measuring import READS_ON, mean_accuracy
from trimtab.flags.spec import FlagSpec
from trimtab.lm import Site
from trimtab.runs.figures import plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import INTERVAL, Column, Table
from trimtab.stats import Interval, Resampled, Resamples, number_text
from trimtab.stats.resamples import auc, column_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL, MEAN = "all", "mean"
"""Stand for the mean over sites, and for that over concepts."""
NEUTRAL, ASKING, RESPONSE = "neutral prompt", "asking prompt", "response"
"""Last tokens of prompts that name none of the concepts, and of those that name one; the mean over the response."""


def reading_values(flags: FlagSpec, draws: Sequence[FlagSpec], harvested: Harvest) -> list[Measured]:
    """How strongly each flag is on in each example, `[N, C]` flat: at each site and on average, at both places; and the
    same on average of each draw of a control (draw 1 and up; 0 are the flags)."""
    found: list[Measured] = []
    for draw, spec in enumerate([flags, *draws]):
        strength = read_strengths(spec, harvested.of(spec))  # [2, N, S, C]
        for place, at in zip(PLACES, strength, strict=True):
            found.append(Measured({"site": ALL, "place": place, "draw": draw}, _flat(at.mean(1))))
            for site, values in zip(spec.sites, at.unbind(1), strict=True) if spec is flags else ():
                found.append(Measured({"site": str(site), "place": place, "draw": draw}, _flat(values)))
    return found


def _flat(values: torch.Tensor) -> NDArray[np.float64]:
    return values.double().flatten().numpy()


@dataclass(frozen=True, kw_only=True)
class FlagRead:
    """How well flags read."""

    moment: Moment
    concept: str
    """`mean` for the mean over concepts."""
    site: str
    """`all` for the mean over sites."""
    layer: int | None
    place: str
    """`neutral prompt`, `asking prompt`: the last token of prompts that name no concept, or name one; `response`: the
    mean over the response's tokens."""
    examples: int
    accuracy: Interval
    """Mean of the shares read right of those that need the concept and of the others: 0.5 is chance."""
    auc: Interval
    """How often an example that needs the concept reads higher than one that does not."""
    unassigned: Interval | None
    """AUC of as many dimensions that are no flag's, mean over several draws; of the means over sites and concepts."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Reading(Result):
    """What flags say of held-out examples."""

    rows: tuple[FlagRead, ...]
    """Means over sites and concepts of every moment, and by site and by concept of each run's last."""

    @property
    def whole(self) -> list[FlagRead]:
        """Means over sites and concepts."""
        return [row for row in self.rows if (row.site, row.concept) == (ALL, MEAN)]

    def last(self, place: str) -> list[FlagRead]:
        """Means over sites and concepts of each run's last moment; nothing if no example has such a prompt."""
        return list({row.moment.run: row for row in self.whole if row.place == place}.values())

    def headline(self) -> str:
        said: dict[str, list[str]] = {}
        for place in (RESPONSE, NEUTRAL, ASKING):
            for row in self.last(place):
                where = "responses" if place == RESPONSE else f"the last token of {place}s"
                said.setdefault(row.moment.run, []).append(f"{number_text(row.auc, INTERVAL)} over {where}")
        return "AUC of flags (0.5 is chance): " + "; ".join(f"{run} {', '.join(of)}" for run, of in said.items())

    def tables(self) -> dict[str, Table]:
        place = Column("place", "place", whole=True)
        scores = [Column("accuracy", "accuracy", INTERVAL), Column("AUC", "auc", INTERVAL)]
        control = Column("unassigned dimensions", "unassigned", INTERVAL, note="AUC")
        caption = (
            "Chance is 0.5. Prompts: at their last token, which sees nothing of the response; neutral ones have no "
            "word of a concept, so nothing above chance is to be expected. Response: mean over its tokens, whose text "
            "gives the concept away. 95% intervals over reported examples, and over draws of the unassigned dimensions."
        )
        found = {
            "reading": ([place, Column("examples", "examples", ",d", spare=1), *scores, control], self.whole),
            "by concept": (
                [Column("concept", "concept", whole=True), place, *scores],
                [row for row in self.rows if row.concept != MEAN],
            ),
            "by site": (
                [place, Column("site", "site", whole=True), *scores], [row for row in self.rows if row.site != ALL],
            ),
        }  # fmt: skip
        return {
            name: Table(columns=[*MOMENT, *columns], rows=rows, caption=caption)
            for name, (columns, rows) in found.items()
        }

    def draw(self, ax: Axes) -> None:
        """AUC by layer after the MLP, of each run's last moment, at every place."""
        rows = [row for row in self.rows if row.site.startswith("resid_post")]
        plot_curves(ax, curves(rows, "auc", "{moment.run}, {place}", "layer"), "AUC", steps="layer")


def reading_result(
    series: Sequence[Series],
    texts: LabelledTexts,
    flags: Mapping[str, FlagSpec],
    resamples: Resamples,
    descriptions: Mapping[str, str] | None = None,
) -> Reading:
    """Intervals of what `reading_values` measured.

    Args:
        series: of each run.
        texts: the examples reported.
        flags: of each run, by its name.
        resamples: of the examples.
        descriptions: what each concept is in words, which tells prompts that name it; the names by default.
    """
    words = described(next(iter(flags.values())).concepts, descriptions)
    asking = np.array([names_one(example.prompt, words) for example in texts.examples])
    places = [(NEUTRAL, "prompt", ~asking), (ASKING, "prompt", asking), (RESPONSE, "response", np.ones_like(asking))]
    found: list[FlagRead] = []
    for place, at, rows in places:
        labels, some = texts.labels[rows], resamples.among(rows)
        if not (labels.any(axis=0) & ~labels.all(axis=0)).any():
            continue  # no such prompts, or too few to say anything
        for moment, part, last in ((m, p, m is s.moments[-1]) for s in series for m, p in zip(*s[:2], strict=True)):
            spec = flags[moment.run]
            strength = {
                (str(row.key["site"]), row.key["draw"]): row.values.reshape(texts.labels.shape)[rows]
                for row in part.rows if row.key["place"] == at
            }  # fmt: skip
            own = strength[ALL, 0]
            control = some.mean_of_draws([mean_auc(of, labels, some) for (_, draw), of in strength.items() if draw])
            wanted = [(MEAN, ALL, own, labels)]
            if last:
                wanted += [(name, ALL, own[:, [i]], labels[:, [i]]) for i, name in enumerate(spec.concepts)]
                wanted += [(MEAN, site, strength[site, 0], labels) for site in map(str, spec.sites)]
            found += [
                FlagRead(
                    moment=moment,
                    concept=concept,
                    site=site,
                    layer=None if site == ALL else Site.parse(site).layer,
                    place=place,
                    examples=len(labels),
                    accuracy=mean_accuracy(of > READS_ON, right, some).interval,
                    auc=mean_auc(of, right, some).interval,
                    unassigned=control.interval if of is own else None,
                )
                for concept, site, of, right in wanted
            ]
    return Reading(rows=tuple(found))


def mean_auc(scores: NDArray[np.float64], labels: NDArray[np.bool_], resamples: Resamples) -> Resampled:
    """AUC, mean over concepts.

    Args:
        scores: `[N, C]`.
        labels: `[N, C]`.
        resamples: of the examples.
    """
    pairs = list(zip(scores.T, labels.T, strict=True))
    return resamples.of(lambda w: column_mean(np.stack([auc(score, label, w) for score, label in pairs], axis=-1)))
