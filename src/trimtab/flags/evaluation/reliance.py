"""Reliance: what a model loses on held-out responses when its flags are taken away, and whether that grows.

Flags are zeroed, set to their mean, set wrong (flipped) or right, at every site and position, and the responses'
cross-entropy is compared with that of the untouched model, example by example. Control: as many dimensions that are no
flag's are moved by exactly as much at each site and position, so that what RMSNorm alone does is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from trimtab.flags.evaluation.measured import MOMENT, Measured, Moment, Part, Series, over_runs
from trimtab.flags.evaluation.texts import LabelledTexts
from trimtab.flags.examples import LabelledBatch, batch_of
from trimtab.flags.loss import response_loss
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, Site, edited
from trimtab.lm.taps import Coordinates
from trimtab.lm.upper_layers import input_site, starting_at
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import NUMBER, SIGNED, Column, Table
from trimtab.stats import Interval, Resampled, Resamples, number_text
from trimtab.stats.resamples import ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WAYS = ("zeroed", "mean", "flipped", "right")
FLAGS, ELSEWHERE, THEMSELVES = "flags", "same change elsewhere", "others zeroed"
"""What is changed: the flags; other dimensions, by as much; other dimensions, to zero."""
PAPER_TOKENS = 50_000 * 10 * 1_024
"""Of the published finetuning, if every text were of full length."""
BEYOND = "beyond the same change elsewhere and what it was at step 0"
LEAST_MOMENTS = 3
"""With fewer, no line is fitted."""


@torch.no_grad()
def reliance_values(
    model: LanguageModel,
    flags: FlagSpec,
    unassigned: FlagSpec,
    mean: Float[Tensor, "S K"],
    texts: LabelledTexts,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Cross-entropy of each example's response, in nats summed over its tokens, under every change.

    Args:
        model: the model.
        flags: its flags.
        unassigned: dimensions of the control.
        mean: what the flags hold on average at each site.
        texts: examples.
        batch_size: examples of a pass.
        progress: told of the examples done.
    """
    sums: dict[tuple[str, str], NDArray[np.float64]] = {}
    n_tokens = np.zeros(len(texts))
    layer = min(site.layer for site in flags.sites)
    own, other = (torch.tensor(spec.flat_dims, device=model.device) for spec in (flags, unassigned))
    both = torch.cat([own, other])
    means = dict(zip(flags.sites, mean.to(model.device)[:, None], strict=True))
    for rows in texts.by_length(batch_size):
        part = texts.take(rows)
        batch = batch_of(model, flags, part.examples, part.tokens)
        n_tokens[rows] = batch.answer.sum(dim=1).tolist()
        held: dict[Site, Tensor] = {}
        taps = {site: partial(_keep, held, site, both) for site in flags.sites}
        with edited(model, {input_site(layer): partial(_keep, held, input_site(layer), None), **taps}):
            _add(sums, ("none", ""), rows, len(texts), response_loss(model, batch), batch)
        for way, dims, change in _changes(flags, own, other, means, held, batch):
            with starting_at(model, layer, held[input_site(layer)]), edited(model, change):
                _add(sums, (way, dims), rows, len(texts), response_loss(model, batch), batch)
        if progress:
            progress(len(rows))
    found = [Measured({"way": way, "dims": dims}, values) for (way, dims), values in sums.items()]
    return [Measured({"way": "tokens", "dims": ""}, n_tokens), *found]


def _keep(held: dict[Site, Tensor], site: Site, dims: Tensor | None, x: Tensor) -> None:
    held[site] = x if dims is None else x.index_select(-1, dims)


def _add(
    sums: dict[tuple[str, str], NDArray[np.float64]],
    key: tuple[str, str],
    rows: list[int],
    n: int,
    losses: Tensor,
    batch: LabelledBatch,
) -> None:
    each = losses.split(batch.answer.sum(dim=1).tolist())
    sums.setdefault(key, np.zeros(n))[rows] = [float(row.double().sum()) for row in each]


def _changes(
    flags: FlagSpec,
    own: Tensor,
    other: Tensor,
    means: dict[Site, Tensor],
    held: dict[Site, Tensor],
    batch: LabelledBatch,
) -> list[tuple[str, str, dict[Site, Callable[[Tensor], Coordinates]]]]:
    """Every way of changing flags, with the same change elsewhere."""
    on = batch.labels[:, flags.concept_of]
    target = {site: flags.targets[str(site)] for site in flags.sites}
    values: dict[str, dict[Site, Tensor]] = {
        "zeroed": {site: torch.zeros_like(on) for site in flags.sites},
        "mean": {site: means[site].expand_as(on) for site in flags.sites},
        "flipped": {site: target[site] * (1 - on) for site in flags.sites},
        "right": {site: target[site] * on for site in flags.sites},
    }
    found, k = [], len(own)
    for way in WAYS:
        set_to = {site: Coordinates(own, value) for site, value in values[way].items()}
        moved = {
            site: Coordinates(other, held[site][..., k:] + (value[:, None] - held[site][..., :k]))
            for site, value in values[way].items()
        }
        found += [(way, FLAGS, _taps(set_to)), (way, ELSEWHERE, _taps(moved))]
    zeros = {site: Coordinates(other, torch.zeros_like(on)) for site in flags.sites}
    return [*found, ("zeroed", THEMSELVES, _taps(zeros))]


def _taps(changes: dict[Site, Coordinates]) -> dict[Site, Callable[[Tensor], Coordinates]]:
    return {site: lambda _x, change=change: change for site, change in changes.items()}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What one change of the flags costs, in nats per token of the responses."""

    moment: Moment
    way: str
    """`zeroed`, `mean`, `flipped` or `right`."""
    flags: Interval
    """Cross-entropy with the flags changed minus that with nothing changed."""
    elsewhere: Interval
    """The same with other dimensions moved by as much."""
    difference: Interval
    """Of the two."""
    gained: Interval | None
    """By how much that difference grew since step 0; None there."""
    others_zeroed: Interval | None
    """With the other dimensions zeroed themselves; of `zeroed` alone."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A straight line through the difference over log10 of the tokens trained on, and where it leads.

    The interval speaks of other prompts. It says nothing of other trainings, nor of whether the line goes on straight.
    """

    run: str
    curriculum: str
    seed: int
    way: str
    moments: int
    tokens: int
    """Trained on at the last moment."""
    slope: Interval
    """Nats per token for each tenfold of the tokens trained on."""
    at_paper: Interval
    """The line at the tokens of the published finetuning."""
    beyond: float
    """How many times the tokens of the last moment that is."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Reliance(Result):
    """What is lost without flags; paired differences with 95% intervals over reported prompts."""

    losses: tuple[Loss, ...]
    growth: tuple[Growth, ...]

    def last(self, way: str) -> list[Loss]:
        """Of each run's last moment."""
        return list({row.moment.run: row for row in self.losses if row.way == way}.values())

    def headline(self) -> str:
        said = [
            f"{row.moment.run} {number_text(row.flags, SIGNED)} (elsewhere {number_text(row.elsewhere, SIGNED)})"
            for row in self.last("zeroed")
        ]
        return f"cross-entropy with flags zeroed, nats per token: {'; '.join(said)}. {self.verdict()}"

    def verdict(self) -> str:
        """Whether reliance was seen without forcing, and how small a one would have been seen."""
        forced, auxiliary = (
            over_runs([row.gained for row in self.last("zeroed") if row.gained and row.moment.curriculum == name])
            for name in ("forced", "auxiliary")
        )
        if forced is None or auxiliary is None:
            return "Whether reliance emerges without forcing takes a forced and an auxiliary run"
        reach = (auxiliary.high - auxiliary.low) / 2
        if auxiliary.low > 0:
            return f"Reliance without forcing: {number_text(auxiliary, SIGNED)} {BEYOND}"
        if forced.low > 0:
            return (
                f"No reliance without forcing was seen ({number_text(auxiliary, SIGNED)} {BEYOND}; one of {reach:.3f} "
                f"would have been), while forcing gives {number_text(forced, SIGNED)}"
            )
        return "Neither forced nor auxiliary training shows reliance at this budget, from which nothing follows"

    def tables(self) -> dict[str, Table]:
        caption = (
            "Nats per token above the untouched model, on held-out responses; elsewhere: as many dimensions that are "
            "no flag's, moved by as much at each site and position. 95% intervals over prompts."
        )
        line = (
            "A straight line through the difference over log10 of the tokens trained on. Intervals speak of other "
            "prompts, not of other trainings, nor of whether the line goes on straight."
        )
        return {
            "reliance": Table(
                columns=[
                    *MOMENT, Column("flags", "way"), Column("cost", "flags", SIGNED),
                    Column("elsewhere", "elsewhere", SIGNED), Column("difference", "difference", SIGNED, spare=1),
                    Column("since step 0", "gained", SIGNED, note="of the difference"),
                    Column("others zeroed", "others_zeroed", SIGNED, spare=1),
                ],
                rows=self.losses, caption=caption,
            ),
            "growth": Table(
                columns=[
                    Column("run", "run", whole=True), Column("curriculum", "curriculum"), Column("flags", "way"),
                    Column("moments", "moments", ",d"), Column("per tenfold", "slope", SIGNED, note="nats per token"),
                    Column("at the paper's tokens", "at_paper", SIGNED),
                    Column("tokens more", "beyond", NUMBER, note="times"),
                ],
                rows=self.growth, caption=line,
            ),
        }  # fmt: skip

    def draw(self, ax: Axes, way: str = "zeroed") -> None:
        """Cost over the tokens trained on, a curve for each run, elsewhere beside it."""
        curves: list[Curve] = []
        for run in dict.fromkeys(row.moment.run for row in self.losses):
            rows = [row for row in self.losses if row.moment.run == run and row.way == way]
            tokens = [row.moment.tokens for row in rows]
            curves.append(Curve(run, tokens, [row.flags.estimate for row in rows]))
            curves.append(Curve(f"{run}, elsewhere", tokens, [row.elsewhere.estimate for row in rows]))
        plot_curves(ax, curves, "nats per token", steps="tokens trained on")


def reliance_result(series: Sequence[Series], resamples: Resamples) -> Reliance:
    """Intervals of what `reliance_values` measured.

    Args:
        series: of each run.
        resamples: of the examples that were measured.
    """
    losses: list[Loss] = []
    growth: list[Growth] = []
    for one in series:
        for way in WAYS:
            differences: list[Resampled] = []
            for moment, part in zip(one.moments, one.parts, strict=True):
                flags, elsewhere = (_cost(part, way, dims, resamples) for dims in (FLAGS, ELSEWHERE))
                differences.append(flags - elsewhere)
                zeroed = _cost(part, way, THEMSELVES, resamples).interval if way == "zeroed" else None
                losses.append(
                    Loss(
                        moment=moment,
                        way=way,
                        flags=flags.interval,
                        elsewhere=elsewhere.interval,
                        difference=differences[-1].interval,
                        gained=(differences[-1] - differences[0]).interval if moment.step else None,
                        others_zeroed=zeroed,
                    )
                )
            growth += _growth(one.moments, differences, way)
    return Reliance(losses=tuple(losses), growth=tuple(growth))


def _cost(part: Part, way: str, dims: str, resamples: Resamples) -> Resampled:
    rise = part.of(way=way, dims=dims) - part.of(way="none", dims="")
    return resamples.of(lambda w: ratio(rise, part.of(way="tokens", dims=""), w))


def tenfolds(tokens: Sequence[int]) -> NDArray[np.float64]:
    """What the line is drawn over."""
    return np.log10(np.asarray(tokens, dtype=np.float64))


def _growth(moments: Sequence[Moment], costs: Sequence[Resampled], way: str) -> list[Growth]:
    """The line by least squares, if there are moments enough behind the original model."""
    known = [(moment, cost) for moment, cost in zip(moments, costs, strict=True) if moment.tokens > 0]
    if len({moment.tokens for moment, _ in known}) < LEAST_MOMENTS:
        return []
    x = tenfolds([moment.tokens for moment, _ in known])
    centred = x - x.mean()
    share = centred / (centred @ centred)  # the slope is this weighted sum of the costs
    there = 1 / len(x) + (tenfolds([PAPER_TOKENS])[0] - x.mean()) * share
    last = known[-1][0]

    def line(weights: NDArray[np.float64]) -> Interval:
        estimate = float(sum(w * cost.estimate for w, (_, cost) in zip(weights, known, strict=True)))
        draws = np.sum([w * cost.draws for w, (_, cost) in zip(weights, known, strict=True)], axis=0)
        return Resampled(estimate, draws, known[0][1].n).interval

    return [
        Growth(
            run=last.run,
            curriculum=last.curriculum,
            seed=last.seed,
            way=way,
            moments=len(known),
            tokens=last.tokens,
            slope=line(share),
            at_paper=line(there),
            beyond=PAPER_TOKENS / last.tokens,
        )
    ]
