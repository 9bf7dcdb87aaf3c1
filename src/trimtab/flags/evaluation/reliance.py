"""Reliance: what a model loses on held-out responses when its flags are taken away or are wrong, and how that grows.

Flags are zeroed, set to their mean, or flipped, all of them, at every site and position, and the responses'
cross-entropy is compared with that of the untouched model, example by example. Control: as many dimensions that are no
flag's are moved by exactly as much at each site and position, so that what RMSNorm alone does is seen; each example has
its own draw of them, so that intervals over examples know how far draws differ.

Or flags are swapped: every concept's are set as the right ones of another concept are, the same other one in all
examples, and compared with the model whose flags are set right. Both writes are of the same kind, and over examples of
all concepts each flag is on as often, so that the difference is what flags say. Its control is the plain run. An
example that needs no concept has no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimtab.flags.evaluation.harvest import PLACES, Harvest
from trimtab.flags.evaluation.measured import (
    CHANGES,
    MOMENT,
    Measured,
    MomentRow,
    Part,
    Series,
    compared,
    curves,
    over_runs,
)
from trimtab.flags.evaluation.texts import LabelledTexts
from trimtab.flags.examples import batch_of
from trimtab.flags.loss import response_sums
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, Site, edited
from trimtab.lm.taps import Coordinates, Tap
from trimtab.lm.upper_layers import starting_at
from trimtab.runs.figures import plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import NUMBER, SIGNED, Column, Table
from trimtab.stats import Interval, Resampled, Resamples, number_text
from trimtab.stats.distributions import student_quantile
from trimtab.stats.resamples import ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NONE, RIGHT, SWAPPED = "none", "right", "swapped"
AGAINST = {"zeroed": NONE, "mean": NONE, "flipped": NONE, SWAPPED: RIGHT}
"""Each change of the flags, and what its cost is above: the untouched model, or the one whose flags are set right."""
SAID = {"zeroed": "zeroing flags", "mean": "flags at their mean", "flipped": "flipping flags"}
SAID |= {SWAPPED: "flags of other concepts in place of the right ones"}
FLAGS, ELSEWHERE = "flags", "same change elsewhere"
"""What is changed: the flags; other dimensions, by as much."""
PAPER_TOKENS = 50_000 * 10 * 1_024
"""Of the published finetuning, if every text were of full length."""
LEAST_MOMENTS = 3
"""With fewer, no line is fitted."""


@torch.no_grad()
def reliance_values(
    model: LanguageModel,
    flags: FlagSpec,
    fitted: Harvest,
    harvested: Harvest,
    texts: LabelledTexts,
    *,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Cross-entropy of each example's response, in nats summed over its tokens, under every change.

    Args:
        model: the model.
        flags: its flags.
        fitted: of other examples; the mean of the flags is that over their responses.
        harvested: of these examples, or of more whose first ones they are, with the inputs of the first layer with
            flags.
        texts: examples.
        seed: of each example's draw of other dimensions.
        batch_size: examples of a pass.
        progress: told of the examples done.
    """
    layer, k, n = flags.first_layer, len(flags.flat_dims), len(texts)
    own, others = torch.tensor(harvested.dims, device=model.device).tensor_split([k])
    pool = np.tile(np.arange(len(others)), (n, 1))
    draws = torch.from_numpy(np.random.default_rng(seed).permuted(pool, axis=1)[:, :k]).to(model.device)
    mean = fitted.of(flags)[PLACES.index("response")].mean(0).to(model.device)  # [S, K]
    told = np.zeros(n, bool)
    sums = {(way, FLAGS): np.zeros(n) for way in (*AGAINST, RIGHT)}
    sums |= {(way, ELSEWHERE): np.zeros(n) for way, against in AGAINST.items() if against == NONE}
    for rows in texts.by_length(batch_size):
        part = texts.take(rows)
        batch = batch_of(model, flags, part.examples, part.tokens)
        hidden, clean = (
            pad_sequence([each[i] for i in rows], batch_first=True, padding_side="left").to(model.device)
            for each in (harvested.inputs[layer], harvested.held)
        )
        swapped = batch.labels.roll(1, dims=1)
        told[rows] = (swapped != batch.labels).any(dim=1).cpu().numpy()
        values = _values(flags, mean, batch.labels, swapped)
        for (way, dims), found in sums.items():
            edits: dict[Site, Tap] = {}
            for i, site in enumerate(flags.sites):
                if dims == FLAGS:
                    edits[site] = Coordinates(own, values[way][:, i])
                else:
                    change = values[way][:, None, i] - clean[:, :, i, :k]
                    edits[site] = partial(_moved, clean[:, :, i, k:], change, others, draws[rows])
            with starting_at(model, layer, hidden), edited(model, edits):
                found[rows] = response_sums(model, batch).cpu()
        if progress:
            progress(len(rows))
    untouched, tokens = harvested.nats[:n].numpy(), harvested.n_tokens[:n].numpy()
    sums[NONE, ""] = untouched
    sums |= {("tokens", NONE): tokens, ("tokens", RIGHT): tokens * told}
    return [Measured({"way": way, "dims": dims}, values) for (way, dims), values in sums.items()]


def _values(
    flags: FlagSpec, mean: Float[Tensor, "S K"], labels: Float[Tensor, "B C"], others: Float[Tensor, "B C"]
) -> dict[str, Float[Tensor, "B S K"]]:
    """What flags are set to at each site."""
    target = torch.tensor(list(flags.targets.values()), device=labels.device)[:, None]
    right, swapped, wrong = (target * on[:, None, flags.concept_of] for on in (labels, others, 1 - labels))
    return {
        "zeroed": torch.zeros_like(right), "mean": mean.expand_as(right), "flipped": wrong, SWAPPED: swapped,
        RIGHT: right,
    }  # fmt: skip


def _moved(
    clean: Float[Tensor, "B T P"],
    change: Float[Tensor, "B T K"],
    pool: Int[Tensor, " P"],
    drawn: Int[Tensor, "B K"],
    x: Float[Tensor, "B T d"],
) -> Coordinates:
    """Those of a pool of dimensions that a row has drawn hold what they held in the clean pass, plus a change."""
    at = drawn[:, None].expand_as(change)
    return Coordinates(pool, x.index_select(-1, pool).scatter(-1, at, (clean.gather(-1, at) + change).to(x)))


@dataclass(frozen=True, kw_only=True)
class RelianceCost(MomentRow):
    """What one change of the flags costs, in nats per token of the responses.

    `change` and `beyond_plain` are of the difference, or, for `swapped`, of the cost.
    """

    way: str
    """`zeroed`, `mean`, `flipped` or `swapped`."""
    flags: Interval
    """Cross-entropy with the flags changed minus that with nothing changed, or, for `swapped`, minus that with the
    flags set right."""
    elsewhere: Interval | None
    """The same with other dimensions moved by as much; None for `swapped`."""
    difference: Interval | None
    """Of the two."""


@dataclass(frozen=True, kw_only=True)
class RelianceLine:
    """A straight line through reliance beyond plain over log10 of the tokens trained on, and where it leads.

    All its moments have the same forced share and λ. The interval speaks of other examples. It says nothing of other
    trainings, nor of whether the line goes on straight.
    """

    line: str
    """A run's last phase, or the ends of runs of different lengths."""
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
    """What is lost without flags; paired differences with 95% intervals over reported examples."""

    costs: tuple[RelianceCost, ...]
    lines: tuple[RelianceLine, ...]

    def last(self, way: str) -> list[RelianceCost]:
        """Of each run's last moment."""
        return list({row.moment.run: row for row in self.costs if row.way == way}.values())

    def headline(self) -> str:
        said = [f"{row.moment.run} {number_text(row.flags, SIGNED)}" for row in self.last(self.way)]
        return f"cost of {SAID[self.way]}, nats per token: {'; '.join(said)}. {self.verdict()}"

    @property
    def way(self) -> str:
        """The change that reliance is told by: `swapped`, or `zeroed` where there is but one concept."""
        return SWAPPED if self.last(SWAPPED) else "zeroed"

    def verdict(self, way: str | None = None) -> str:
        """Whether reliance was seen without forcing, and how small a one would have been seen.

        Args:
            way: the change that it is told by; by default `self.way`.
        """
        way, unknown = way or self.way, "Whether reliance emerges without forcing is not known"
        found = [row for row in self.costs if row.way == way and row.moment.step]
        ends = {name: [row for row in found if row.moment.curriculum == name] for name in ("forced", "auxiliary")}
        missing = [f"{name} run" for name, rows in ends.items() if not rows]
        if missing:
            return f"{unknown}: there is no {' and no '.join(missing)}"
        forced_at, auxiliary_at = ({row.moment.step for row in rows} for rows in ends.values())
        if not forced_at & auxiliary_at:
            return f"{unknown}: forced and auxiliary runs were measured at no common step"
        step = max(forced_at & auxiliary_at)
        ends = {name: [row for row in rows if row.moment.step == step] for name, rows in ends.items()}
        gains = {name: [row.beyond_plain for row in rows if row.beyond_plain] for name, rows in ends.items()}
        alone = [row.moment.run for rows in ends.values() for row in rows if not row.beyond_plain]
        if not all(gains.values()):
            return f"{unknown}: the control is missing, a plain run of the same seed and steps as {', '.join(alone)}"
        values = {name: over_runs(of) for name, of in gains.items()}
        forced, auxiliary = values["forced"], values["auxiliary"]
        seen = ", ".join(
            f"{name} {number_text(value, SIGNED)} at {step:,} steps ("
            + (f"mean of {n} seeds, interval over seeds" if n > 1 else "one seed, interval over examples alone") + ")"
            for name, value in values.items()
            for n in [len(gains[name])]
        )  # fmt: skip
        elsewhere = "" if way == SWAPPED else " and the same change elsewhere"
        measure = f"Extra cost of {SAID[way]}, in nats per token beyond the plain run{elsewhere}"
        if auxiliary.low > 0:
            answer = "The model came to rely on its flags without forcing."
        elif forced.low > 0:
            df = max(auxiliary.n - 1, 1)  # as many standard errors as Bloom, "Minimum detectable effects", 1995, has
            more = student_quantile(0.8, df) / student_quantile(0.975, df)
            least = number_text((auxiliary.high - auxiliary.low) / 2 * (1 + more), SIGNED)
            answer = (
                "No reliance without forcing was seen, where forcing gives reliance. An effect of auxiliary training "
                f"of {least} would have been seen with 80% power."
            )
        else:
            answer = "No reliance was seen, not even with forcing: this budget cannot answer the question."
        left = f"; left out, as there is no plain run beside them: {', '.join(alone)}" if alone else ""
        return f"{answer} {measure}: {seen}{left}"

    def tables(self) -> dict[str, Table]:
        caption = (
            "Nats per token above the untouched model, on held-out responses, or, where flags are swapped for those "
            "of other concepts, above the model whose flags are set right; elsewhere: as many dimensions that are no "
            "flag's, of like variance, moved by as much at each site and position. Beyond plain: the difference (for "
            "swapped flags the cost) minus that of the plain run at equal steps. 95% intervals over examples."
        )
        line = (
            "Straight lines through the difference beyond plain over log10 of the tokens trained on, each through at "
            "least three moments with the same forced share, λ and learning rate: one run's last phase, or the ends of "
            "runs of different lengths. Intervals speak of other examples, not of other trainings, nor of whether a "
            "line goes on straight."
        )
        return {
            "reliance": Table(
                columns=[
                    *MOMENT, Column("flags", "way"), Column("cost", "flags", SIGNED),
                    Column("elsewhere", "elsewhere", SIGNED), Column("difference", "difference", SIGNED, spare=1),
                    *CHANGES,
                ],
                rows=self.costs, caption=caption,
            ),
            "growth": Table(
                columns=[
                    Column("line", "line", whole=True), Column("flags", "way"),
                    Column("moments", "moments", ",d"), Column("per tenfold", "slope", SIGNED, note="nats per token"),
                    Column("at the paper's tokens", "at_paper", SIGNED),
                    Column("tokens more", "beyond", NUMBER, note="times"),
                ],
                rows=self.lines, caption=line,
            ),
        }  # fmt: skip

    def draw(self, ax: Axes, way: str | None = None) -> None:
        """Cost over the tokens trained on, a curve for each run, elsewhere beside it."""
        rows = [row for row in self.costs if row.way == (way or self.way)]
        found = curves(rows, "flags", x="moment.tokens")
        if all(row.elsewhere for row in rows):
            found = [*found, *curves(rows, "elsewhere", "{moment.run}, elsewhere", "moment.tokens")]
        plot_curves(ax, found, "nats per token", steps="tokens trained on")


def reliance_result(series: Sequence[Series], resamples: Resamples) -> Reliance:
    """Intervals of what `reliance_values` measured.

    Args:
        series: of each run.
        resamples: of the examples that were measured.
    """

    def cost(part: Part, way: str, dims: str) -> Resampled:
        against = part.of(way=RIGHT, dims=FLAGS) if AGAINST[way] == RIGHT else part.of(way=NONE, dims="")
        rise = part.of(way=way, dims=dims) - against
        return resamples.of(partial(ratio, rise, part.of(way="tokens", dims=AGAINST[way])))

    def values(part: Part) -> dict[str, Resampled]:
        found = {way: cost(part, way, FLAGS) - cost(part, way, ELSEWHERE) for way in AGAINST if way != SWAPPED}
        told = part.of(way="tokens", dims=RIGHT).any()
        return found | ({SWAPPED: cost(part, SWAPPED, FLAGS)} if told else {})

    costs: list[RelianceCost] = []
    points: dict[tuple[str, str], list[tuple[int, Resampled]]] = {}
    ends = {one.run: one.moments[-1].step for one in series}
    for row in compared(series, values):
        moment, controlled = row.moment, row.key != SWAPPED
        costs.append(
            RelianceCost(
                **row.fields, way=row.key, flags=cost(row.part, row.key, FLAGS).interval,
                elsewhere=cost(row.part, row.key, ELSEWHERE).interval if controlled else None,
                difference=row.value.interval if controlled else None,
            )
        )  # fmt: skip
        if row.plain and moment.last_phase:
            lines = [f"{moment.run}, last phase"]
            if moment.step == ends[moment.run]:
                lines.append(f"ends of {moment.curriculum} runs, seed {moment.seed}")
            for line in lines:
                points.setdefault((line, row.key), []).append((moment.tokens, row.value - row.plain))
    known = [_line(*key, of) for key, of in points.items() if len({tokens for tokens, _ in of}) >= LEAST_MOMENTS]
    return Reliance(costs=tuple(costs), lines=tuple(known))


def _line(name: str, way: str, points: Sequence[tuple[int, Resampled]]) -> RelianceLine:
    """The line by least squares, through the data and through each resample."""
    tokens, values = [n for n, _ in points], np.stack([[one.estimate, *one.draws] for _, one in points])
    slope, start = np.polyfit(np.log10(tokens), values, 1)
    at_paper = start + slope * np.log10(PAPER_TOKENS)
    intervals = [Resampled(float(each[0]), each[1:], points[0][1].n).interval for each in (slope, at_paper)]
    return RelianceLine(
        line=name, way=way, moments=len(points), tokens=max(tokens), slope=intervals[0], at_paper=intervals[1],
        beyond=PAPER_TOKENS / max(tokens),
    )  # fmt: skip
