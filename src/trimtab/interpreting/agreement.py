"""Whether SAEs that a judge understands better also steer better: the rank analysis of arXiv 2510.03659, checked.

The published correlation after selection is against gain in percent, which is not the score that selection gives: gain
is lower the higher the score before, whatever else it is. Both are computed, and how far gain alone moves τ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.interpreting.scored_sae import ScoredSAE, read_scored_saes
from trimtab.runs.figures import Mark, plot_intervals
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, SIGNED, Column, Table
from trimtab.stats import Interval, RankScores, Resampled, benjamini_hochberg, highest_tau, number_text
from trimtab.stats.kendall import LEAST_UNITS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

INTERPRETABILITY, BEFORE, AFTER, GAIN = "interpretability", "before selection", "after ", "gain by "
"""What is compared; the last two are followed by the name of a selection."""
ALL, ONE_MODEL = "all", "pairs of one model"
MEASURED, AMOUNTS, FACTORS = "measured", "amounts shuffled", "factors shuffled"
GAIN_SHUFFLES = 2000
SPLITS = 10
"""Random halves of parts; τ of halves is their mean."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far interpretability ranks some SAEs as a utility does."""

    by: str
    """`all`, or what is held fixed: architecture, sparsity or model."""
    group: str
    """Which SAEs; `pairs of one model` compares all, but only with those of the same model."""
    against: str
    """The utility: `before selection`, `after NAME` or `gain by NAME` (in percent)."""
    n: int
    tau: Interval
    p: float
    """Of the permutation test within models."""
    adjusted_p: float
    """The same, corrected for all groups of the same kind (Benjamini and Hochberg)."""
    expected: float
    """Mean τ of SAEs shuffled within models."""
    spread: float
    """Its standard deviation: the standard error of τ if there is no association."""
    least_bound: float
    """The smallest d for which |τ| < d is shown at 5%; NaN where τ has no interval."""
    change: Interval | None
    """τ less that before selection, on the same resamples."""


@dataclass(frozen=True, kw_only=True)
class PartialAgreement:
    """The same given other scores of the SAEs."""

    against: str
    given: str
    tau: Interval
    """Kendall's partial τ."""
    expected: float
    """What it is, on average, where interpretability is independent of utility given them: not 0."""
    p: float
    """Of the permutation test against that."""


@dataclass(frozen=True, kw_only=True)
class GainCheck:
    """What τ is against the selected score and against gain: as measured, and if what selection does were independent
    of interpretability."""

    selection: str
    case: str
    """`measured`; `amounts shuffled`: what selection adds is dealt out anew within models; `factors shuffled`: what it
    multiplies by is."""
    after: Interval
    """τ of interpretability and the score after selection. Of shuffles the mean and the central 95%."""
    gain: Interval
    """τ of interpretability and gain in percent."""
    before_gain: Interval
    """τ of the score before selection and gain in percent."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How far two halves of a score rank the SAEs alike."""

    group: str
    score: str
    halves: Interval
    """τ of two halves, mean over random halves. It has no Spearman–Brown formula."""


@dataclass(frozen=True, kw_only=True)
class ShuffledJudge:
    """τ where a judge's answers were shuffled: what it owes to something else than judgement."""

    score: str
    against: str
    tau: Interval
    p: float


@dataclass(frozen=True, kw_only=True, repr=False)
class RankAgreement(Result):
    """How far interpretability ranks SAEs as utility does, and what that is worth."""

    agreements: tuple[Agreement, ...]
    partial: tuple[PartialAgreement, ...]
    gains: tuple[GainCheck, ...]
    reliability: tuple[Reliability, ...]
    highest: dict[str, Interval]
    """By group the τ that two scores as reliable as these reach if they rank by the same truth (`highest_tau`)."""
    shuffled: tuple[ShuffledJudge, ...]
    notes: tuple[str, ...]
    """What was left out, and why."""

    def of(self, group: str = ALL, against: str = BEFORE) -> Agreement:
        """One of the agreements. Raises a `UserError` if there is none."""
        for one in self.agreements:
            if (one.group, one.against) == (group, against):
                return one
        raise UserError(f"agreement of {group!r} {against!r}", "there is none", f"groups are {sorted(self._groups())}")

    def _groups(self) -> set[str]:
        return {one.group for one in self.agreements}

    def headline(self) -> str:
        parts: list[str] = []
        for one in (one for one in self.agreements if one.group == ALL):
            shown = "" if one.tau.low > 0 or one.tau.high < 0 else f", |τ| below {number_text(one.least_bound, '.2f')}"
            parts.append(f"{one.against} {number_text(one.tau, '+.2f')} (p {one.p:.3g}{shown})")
        n = self.agreements[0].n
        return f"Interpretability and utility of {n} SAEs, Kendall's τ: {'; '.join(parts)}."

    def tables(self) -> Mapping[str, Table]:
        found = {
            "agreement": Table(columns=_AGREEMENT, rows=[a for a in self.agreements if a.by == ALL], caption=_CAPTION),
            "groups": Table(
                columns=[*_AGREEMENT[:5], _ADJUSTED, *_AGREEMENT[5:]],
                rows=[a for a in self.agreements if a.by != ALL],
                caption=" ".join(("p adjusted for the groups of one kind.", *self.notes)),
            ),
            "given": Table(columns=_PARTIAL, rows=self.partial, caption=_PARTIAL_CAPTION),
            "gain": Table(columns=_GAIN, rows=self.gains, caption=_GAIN_CAPTION),
            "halves": Table(columns=_HALVES, rows=self.reliability, caption=self._highest_text()),
            "shuffled judge": Table(columns=_SHUFFLED, rows=self.shuffled),
        }
        return {name: table for name, table in found.items() if table.rows}

    def _highest_text(self) -> str:
        said = "; ".join(f"{group} {number_text(one, '.2f')}" for group, one in self.highest.items())
        return f"Highest τ of scores as reliable as both, if they rank by one truth: {said or '–'}."

    def draw(self, ax: Axes) -> None:
        """Intervals of all groups before selection."""
        self.draw_against(ax, BEFORE)

    def draw_against(self, ax: Axes, against: str) -> None:
        """Intervals of all groups, such as `after delta_confidence`."""
        marks = [Mark(a.group, a.tau, strong=a.by == ALL) for a in self.agreements if a.against == against]
        plot_intervals(ax, marks, f"Kendall's τ of interpretability and utility {against}", "+.2f")


_AGREEMENT = [
    Column("SAEs", "group"),
    Column("utility", "against"),
    Column("n", "n", COUNT, spare=3),
    Column("τ", "tau", SIGNED),
    Column("p", "p", ".2g"),
    Column("shuffled", "expected", SIGNED, spare=2),
    Column("sd", "spread", ".3f", spare=2),
    Column("|τ| below", "least_bound", ".3f"),
    Column("less before", "change", SIGNED, spare=1),
]
_ADJUSTED = Column("p adjusted", "adjusted_p", ".2g")
_CAPTION = (
    "Kendall's τ_b with 95% intervals: SAEs resampled within models. p: SAEs shuffled within models; shuffled, sd: "
    "mean and standard deviation of τ then. |τ| below: the smallest bound that is shown at 5%. Less before: change of "
    "τ by selection, on the same resamples."
)
_PARTIAL = [
    Column("utility", "against"),
    Column("given", "given"),
    Column("partial τ", "tau", SIGNED),
    Column("independent", "expected", SIGNED),
    Column("p", "p", ".2g"),
]
_PARTIAL_CAPTION = (
    "Kendall's partial τ. Independent: its mean where interpretability is shuffled but for what it shares with the "
    "given scores, which is what p tests against."
)
_GAIN = [
    Column("selection", "selection"),
    Column("what it does", "case"),
    Column("τ after", "after", SIGNED),
    Column("τ of gain", "gain", SIGNED),
    Column("τ of before and gain", "before_gain", SIGNED),
]
_GAIN_CAPTION = (
    "Shuffled within models, what selection does is independent of interpretability (mean and central 95% of shuffles):"
    " τ against gain is then what percentages make of it."
)
_HALVES = [Column("SAEs", "group"), Column("score", "score"), Column("τ of halves", "halves", SIGNED)]
_SHUFFLED = [
    Column("interpretability", "score"),
    Column("utility", "against"),
    Column("τ", "tau", SIGNED),
    Column("p", "p", ".2g"),
]


def rank_agreement(
    saes: pd.DataFrame | Iterable[ScoredSAE | Mapping[str, Any]], *, n_resamples: int = 10_000, seed: int = 0
) -> RankAgreement:
    """Kendall's τ_b of interpretability and utility over SAEs, before and after selection, with all its checks.

    Args:
        saes: SAEs with their scores, or a table of them (`read_scored_saes`).
        n_resamples: resamples and shuffles for each number.
        seed: of both.

    Raises:
        UserError: fewer than five SAEs, scores that are missing, not finite or all equal, unknown columns.

    Source: arXiv 2510.03659, section 4; `stats.RankScores`.
    """
    found = read_scored_saes(saes)
    groups = {ALL: _Group(found, n_resamples, seed)}
    if len({sae.model for sae in found}) > 1:
        groups[ONE_MODEL] = _Group(found, n_resamples, seed, same_stratum=True)
    agreements = [a for name, group in groups.items() for a in group.agreements(ALL, name)]
    notes: list[str] = []
    for by in ("architecture", "sparsity", "model"):
        rows: list[Agreement] = []
        values: list[Any] = sorted({getattr(sae, by) for sae in found})
        for value in values if len(values) > 1 else []:
            members = [sae for sae in found if getattr(sae, by) == value]
            name = f"L0 {value:g}" if by == "sparsity" else str(value)
            try:
                rows += _Group(members, n_resamples, seed).agreements(by, name)
            except UserError as error:
                notes.append(f"Left out: {name} ({error.line}).")
        agreements += _adjusted(rows)
    no_utility = sum(sae.utility <= 0 for sae in found)
    if no_utility:
        notes.append(f"{no_utility} of {len(found)} SAEs have no utility before selection, so no gain in percent.")
    highest = {name: group.highest() for name, group in groups.items()}
    return RankAgreement(
        agreements=tuple(agreements),
        partial=tuple(groups[ALL].partial(notes)),
        gains=tuple(groups[ALL].gain_checks()),
        reliability=tuple(r for name, group in groups.items() for r in group.reliability(name)),
        highest={name: one for name, one in highest.items() if one is not None},
        shuffled=tuple(groups[ALL].shuffled()),
        notes=tuple(notes),
    )


class _Group:
    """Some of the SAEs, as scores that are ranked. Raises a `UserError` where they cannot be."""

    def __init__(self, saes: list[ScoredSAE], n_resamples: int, seed: int, *, same_stratum: bool = False) -> None:
        self.saes, self._n_resamples, self._seed, self._same_stratum = saes, n_resamples, seed, same_stratum
        self._columns: dict[str, Floats] = {
            INTERPRETABILITY: _column(saes, "interpretability"),
            BEFORE: _column(saes, "utility"),
            **{
                AFTER + name: np.array([sae.selected[name] for sae in saes])
                for name in (saes[0].selected if saes else ())
            },
        }
        gains = {
            GAIN + name.removeprefix(AFTER): 100 * (after / self._columns[BEFORE] - 1)
            for name, after in self._columns.items()
            if name.startswith(AFTER) and (self._columns[BEFORE] > 0).all()
        }
        self._columns |= gains
        self.utilities = [name for name in self._columns if name != INTERPRETABILITY]
        self.ranks = self._with({})

    def _with(self, more: dict[str, Floats]) -> RankScores:
        """The scores, and others, on the same resamples."""
        return RankScores(
            self._columns | more,
            within=[sae.model for sae in self.saes],
            same_stratum=self._same_stratum,
            n_resamples=self._n_resamples,
            seed=self._seed,
        )

    @cached_property
    def steering(self) -> _Group | None:
        """Those that steer at all before selection, of which alone there is a gain in percent."""
        kept = [sae for sae in self.saes if sae.utility > 0]
        if len(kept) == len(self.saes):
            return self
        fewer = len(kept) < LEAST_UNITS
        return None if fewer else _Group(kept, self._n_resamples, self._seed, same_stratum=self._same_stratum)

    def agreements(self, by: str, group: str) -> Iterator[Agreement]:
        """With each utility."""
        tests = self.ranks.permutation_tests(INTERPRETABILITY, self.utilities)
        before = self.ranks.tau(INTERPRETABILITY, BEFORE)
        for against, test in zip(self.utilities, tests, strict=True):
            tau = self.ranks.tau(INTERPRETABILITY, against)
            yield Agreement(
                by=by,
                group=group,
                against=against,
                n=self.ranks.n,
                tau=self.ranks.interval(tau),
                p=test.p,
                adjusted_p=test.p,
                expected=test.expected,
                spread=test.spread,
                least_bound=self.ranks.least_bound(tau),
                change=None if against == BEFORE else self.ranks.interval(tau - before),
            )
        if self.steering not in (self, None):
            yield from (one for one in self.steering.agreements(by, group) if one.against.startswith(GAIN))

    def partial(self, notes: list[str]) -> Iterator[PartialAgreement]:
        """Given what is known of the SAEs' explained variance and share of dead features, each and both."""
        known: dict[str, Floats] = {}
        for name in ("explained_variance", "dead_share"):
            if getattr(self.saes[0], name) is not None:
                values = _column(self.saes, name)
                if (values == values[0]).all():
                    notes.append(f"Nothing is given {name}, which is {values[0]:g} for all SAEs.")
                else:
                    known[name.replace("_", " ")] = values
        ranks = self._with(known)
        for given in [*([name] for name in known), *[list(known)] * (len(known) > 1)]:
            tests = ranks.permutation_tests(INTERPRETABILITY, self.utilities, given)
            for against, test in zip(self.utilities, tests, strict=True):
                tau = ranks.interval(ranks.tau(INTERPRETABILITY, against, given))
                yield PartialAgreement(
                    against=against, given=" and ".join(given), tau=tau, expected=test.expected, p=test.p
                )

    def gain_checks(self) -> Iterator[GainCheck]:
        """τ against the selected score and against gain, measured and where selection knows no interpretability."""
        group = self.steering
        if group is None:
            return
        ranks, before = group.ranks, group._columns[BEFORE]
        shuffles = ranks.shuffles[1 : 1 + GAIN_SHUFFLES]
        for after in (name for name in group.utilities if name.startswith(AFTER)):
            selection = after.removeprefix(AFTER)
            gain, values = GAIN + selection, group._columns[after]
            pairs = ((INTERPRETABILITY, after), (INTERPRETABILITY, gain), (BEFORE, gain))
            measured = [ranks.interval(ranks.tau(*pair)) for pair in pairs]
            yield GainCheck(
                selection=selection, case=MEASURED, after=measured[0], gain=measured[1], before_gain=measured[2]
            )
            for case, dealt in (
                (AMOUNTS, before + (values - before)[shuffles]),
                (FACTORS, before * (values / before)[shuffles]),
            ):
                # Rounded, so that equal gains stay equal.
                (of_after,) = ranks.taus_of_rows(dealt, [INTERPRETABILITY]).T
                of_gain, of_before = ranks.taus_of_rows(np.round(dealt / before, 9), [INTERPRETABILITY, BEFORE]).T
                spans = [_span(taus, ranks.n) for taus in (of_after, of_gain, of_before)]
                yield GainCheck(selection=selection, case=case, after=spans[0], gain=spans[1], before_gain=spans[2])

    def reliability(self, group: str) -> Iterator[Reliability]:
        """Of the scores that come in parts."""
        for score, halves in self._halves.items():
            yield Reliability(group=group, score=score, halves=self.ranks.interval(halves))

    def highest(self) -> Interval | None:
        """The τ of two scores as reliable as these; None without parts of both."""
        if len(self._halves) < 2:
            return None
        x, y = self._halves.values()
        estimate = float(highest_tau(np.array(x.estimate), np.array(y.estimate)))
        return self.ranks.interval(Resampled(estimate, highest_tau(x.draws, y.draws), x.n))

    @cached_property
    def _halves(self) -> dict[str, Resampled]:
        """τ of halves, mean over random halves of the parts; two parts are halves as they are."""
        found: dict[str, Resampled] = {}
        for score in ("interpretability", "utility"):
            parts: list[tuple[float, ...]] = [getattr(sae, f"{score}_parts") for sae in self.saes]
            if not parts[0]:
                continue
            rng = np.random.default_rng([self._seed, 2])
            n_splits = 1 if all(len(one) == 2 for one in parts) else SPLITS
            halves = [np.array([_halved(one, rng) for one in parts]) for _ in range(n_splits)]
            ranks = self._with({f"{k} {side}": halves[k][:, side] for k in range(n_splits) for side in (0, 1)})
            found[score] = Resampled.mean([ranks.tau(f"{k} 0", f"{k} 1") for k in range(n_splits)])
        return found

    def shuffled(self) -> Iterator[ShuffledJudge]:
        """What shuffled judges' scores agree with."""
        known = {
            name: _column(self.saes, name)
            for name in ("interpretability_shuffled", "utility_shuffled")
            if getattr(self.saes[0], name) is not None
        }
        ranks = self._with({name.replace("_", " "): values for name, values in known.items()})
        pairs = [("interpretability shuffled", against) for against in self.utilities]
        pairs += [(INTERPRETABILITY, "utility shuffled"), ("interpretability shuffled", "utility shuffled")]
        for score, against in pairs:
            if {score, against} <= ranks.scores.keys():
                (test,) = ranks.permutation_tests(score, [against])
                yield ShuffledJudge(
                    score=score, against=against, tau=ranks.interval(ranks.tau(score, against)), p=test.p
                )


def _column(saes: list[ScoredSAE], name: str) -> Floats:
    return np.array([getattr(sae, name) for sae in saes], dtype=np.float64)


def _halved(parts: tuple[float, ...], rng: np.random.Generator) -> tuple[float, float]:
    """Means of two halves, dealt at random if there are more than two parts."""
    dealt = rng.permutation(parts) if len(parts) > 2 else np.array(parts)
    half = len(dealt) // 2
    return float(dealt[:half].mean()), float(dealt[half:].mean())


def _span(taus: Floats, n: int) -> Interval:
    """Mean and central 95% of shuffles."""
    low, high = np.quantile(taus, [0.025, 0.975])
    return Interval(estimate=float(taus.mean()), low=float(low), high=float(high), n=n, method="shuffles")


def _adjusted(rows: Sequence[Agreement]) -> Iterator[Agreement]:
    """With p-values corrected for the number of groups, for each utility by itself."""
    for against in dict.fromkeys(row.against for row in rows):
        own = [row for row in rows if row.against == against]
        for row, p in zip(own, benjamini_hochberg([row.p for row in own]), strict=True):
            yield replace(row, adjusted_p=float(p))
