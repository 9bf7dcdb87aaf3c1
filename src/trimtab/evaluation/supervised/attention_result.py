"""What few terms explain of attention scores, per contender and head, as tables and curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import Column, Table
from trimtab.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIFFERENCE, BOTH, ALL = "IO − S1", "IO, S1", "all"


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a score."""

    query: str
    """What of the query: a factor (IO, S, Pos), the number of a feature, `mean` or `bias`."""
    key: str
    """What of the key."""
    position: str
    """Of the key: IO or S1."""
    alone: Interval | None
    """Share of the score's variance that it explains by itself; below 0 where it adds to it. None, as other shares,
    where the score does not vary."""


@dataclass(frozen=True, kw_only=True)
class TermShare:
    """What the best terms explain."""

    t: int
    """At most so many."""
    share: Interval | None
    """Of the variance over test prompts: 1 − Var(score − terms) / Var(score)."""


@dataclass(frozen=True, kw_only=True)
class HeadTerms:
    """One contender's terms of one head's score."""

    contender: str
    head: str
    """`LAYER.HEAD`, or `all`: variances summed over heads, each with its own terms."""
    score: str
    """Of the key at `IO`, at `S1`, their difference, `IO − S1`, or both as observations of their own, `IO, S1`: what
    makes the head prefer one of them in every prompt is no variance over prompts, but it is one over both keys."""
    mean: Interval
    """Of the score over test prompts, before the softmax; over heads as well."""
    n_train: int
    """Prompts by which its terms were chosen, the first of the result's: fewer than those where features are dense."""
    n_terms: int
    """Pairs of parts that are active together on some of these prompts, errors left out."""
    shares: tuple[TermShare, ...]
    whole: Interval | None
    """Share explained by all terms without an error: by the reconstruction."""
    terms: tuple[Term, ...] = ()
    """The first that were chosen."""

    def share_of(self, t: int) -> Interval | None:
        """What the best t terms explain, if that was asked for."""
        return next((found.share for found in self.shares if found.t == t), None)


@dataclass(frozen=True, kw_only=True, repr=False)
class AttentionTerms(Result):
    """Attention scores of heads, taken apart by several contenders."""

    model: str
    n_train: int
    """Prompts by which terms were chosen, the first of the train prompts."""
    n_test: int
    """Other prompts, which are reported."""
    scores: tuple[HeadTerms, ...]

    def overall(self) -> list[HeadTerms]:
        """Per contender both scores as observations of their own, over all heads."""
        found = [one for one in self.scores if one.score == BOTH]
        return [one for one in found if one.head == ALL] or found

    def headline(self) -> str:
        """What the best four terms, or fewer, explain of both scores, over all heads."""
        said: list[str] = []
        for one in self.overall():
            best = max((share for share in one.shares if share.t <= 4), key=lambda share: share.t, default=None)
            if best is not None and best.share is not None:
                said.append(f"{one.contender} {best.share.estimate:.2f} by {best.t}")
        return f"variance of attention scores explained by few terms: {', '.join(said) or 'none'}"

    def tables(self) -> dict[str, Table]:
        """Shares, and the terms that were chosen first."""
        ts = dict.fromkeys(share.t for one in self.scores for share in one.shares)
        columns = [
            Column("score", "score"), Column("head", "head", whole=True), Column("contender", "contender"),
            *(Column(f"t = {t}", lambda row, t=t: row.share_of(t), ".2f", spare=t) for t in ts),
            Column("whole", "whole", ".2f"), Column("of", "n_terms", "d"), Column("chosen on", "n_train", "d"),
        ]  # fmt: skip
        named = [
            Column("score", "score"), Column("head", "head", whole=True), Column("contender", "contender"),
            Column("query", "query"), Column("key", "key"), Column("at", "position"), Column("alone", "alone", ".2f"),
        ]  # fmt: skip
        rows = [
            {"score": one.score, "head": one.head, "contender": one.contender, **vars(term)}
            for one in self.scores
            for term in one.terms
        ]
        caption = "Share of the variance over test prompts that the best t terms explain."
        return {
            "shares": Table(columns=columns, rows=self.scores, caption=caption),
            "terms": Table(columns=named, rows=rows),
        }

    def draw(self, ax: Axes) -> None:
        """Share of the variance of both scores against the number of terms, a curve per contender."""
        curves = [
            Curve(one.contender, [s.t for s in one.shares], [s.share.estimate for s in one.shares if s.share])
            for one in self.overall()
            if one.whole is not None
        ]
        plot_curves(ax, curves, "share of variance explained", steps="terms")
        ax.set_xscale("log", base=2)
        ticks = sorted({step for curve in curves for step in curve.steps})
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
