"""What steering towards concepts came to, by arm: scores at factors that other instructions chose, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimtab.errors import named
from trimtab.interpreting.axbench.arms import Ground
from trimtab.interpreting.axbench.writing import FluencyCheck
from trimtab.interpreting.calibration import JudgeCalibration, right_on
from trimtab.interpreting.instructions import Instructions
from trimtab.interpreting.judge import FeatureJudge, Meaning, ToRate, shuffled_meanings
from trimtab.interpreting.nested_selection import NestedSelection, best_dose, select_nested
from trimtab.judges import Unjudged
from trimtab.runs import part_of
from trimtab.runs.figures import Mark, plot_intervals
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, INTERVAL, NUMBER, SHARE, SIGNED, Column, Table
from trimtab.stats import Interval, bootstrap_mean, crossed_mean, student_mean
from trimtab.stats.resamples import column_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]
_ANSWER = (
    "arm", "concept", "feature", "factor", "instruction", "reports", "text", "ordinary", "has_concept", "follows",
    "fluent", "overall",
)  # fmt: skip
"""Columns of all answers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmUtility:
    """All that a judge said of an arm's answers."""

    arm: str
    factors: tuple[float, ...]
    features: tuple[int | None, ...]
    """`[C]` by which each concept was steered, if any."""
    scores: Floats
    """`[C, D, I, 3]` concept, instruction, fluency, each 0 to 2; NaN where there is no judgement."""
    ordinary: NDArray[np.bool_]
    """`[C, D, I]` whether texts are ordinary; where not, fluency is 0."""
    texts: Sequence[Sequence[Sequence[str | None]]] = field(repr=False)
    """`[C, D, I]`; None where none was written: to what reports at the factor chosen alone."""

    @property
    def overall(self) -> Floats:
        """`[C, D, I]` harmonic means of the three scores: 0 where one is."""
        return harmonic_means(self.scores)

    @property
    def gaps(self) -> NDArray[np.int64]:
        """`[C]` answers that were not judged."""
        written = np.array([[[text is not None for text in texts] for texts in concept] for concept in self.texts])
        return (np.isnan(self.scores).any(axis=-1) & written).sum(axis=(1, 2))


@dataclass(frozen=True, kw_only=True)
class ConceptScore:
    """What an arm made of a concept."""

    concept: str
    arm: str
    meaning: str
    """In the judge's words."""
    feature: int | None
    factor: float | None
    """Of the highest score on the instructions to choose on; None if nothing was judged there."""
    score: Interval | None
    """On the others, over which the interval is; None if nothing was judged there."""
    gaps: int
    """Answers at any factor that were not judged."""


@dataclass(frozen=True, kw_only=True)
class ArmScore:
    """What an arm came to over concepts, each at its factor, on the instructions that chose nothing."""

    arm: str
    concepts: int
    """Which were judged."""
    score: Interval | None
    """Mean of the harmonic means, from 0 to 2; over concepts and instructions."""
    over_random: Interval | None
    """What it has more than random features at the same factors, whose best was chosen alike; paired."""
    of_others: Interval | None = None
    """Score of the same answers where the judge reads them for another of the concepts; None if there is no other."""
    concept: float
    instruction: float
    fluency: float
    """Means of the judge's three scores, the last one 0 where a text is not ordinary."""
    ordinary: float
    """Share of texts that are."""
    factor: float
    """Median of those chosen."""
    gaps: int


@dataclass(frozen=True, kw_only=True, repr=False)
class AxBenchResult(Result):
    """Scores of arms and concepts."""

    model: str
    site: str
    unit: str
    judge: str
    version: str
    choosing: int
    """Instructions that factors were chosen on."""
    reporting: int
    arms: tuple[ArmScore, ...]
    concepts: tuple[ConceptScore, ...]
    unexplained: tuple[tuple[str, str], ...]
    """Concepts of which the judge makes nothing, and why."""
    fluency_check: FluencyCheck
    judge_accuracy: Interval | None = None
    """Of its decisions whether labelled texts have their concept, where they were measured."""
    halved: bool = False
    """Whether arms were fitted on other exemplars than those that the judge saw, half each; otherwise none was fitted
    on any."""
    selection: NestedSelection | None = None
    """Whether criteria find the features that steer better, where some were given."""

    def headline(self) -> str:
        # Random features are what the others are held against, and are no way to steer.
        random = next((one for one in self.arms if one.arm == "random"), None)
        others = [one for one in self.arms if one is not random] or self.arms
        best = max(others, key=lambda one: -1.0 if one.score is None else one.score.estimate)
        beside = "" if random is None or random is best else f" (random features {_text(random.score)})"
        many = "s" * (len(others) != 1)
        gaps = sum(one.gaps for one in self.arms)
        said = f"; {gaps:,} answers were not judged" * bool(gaps)
        return (
            f"{best.arm} does best of {len(others)} arm{many}: {_text(best.score)} of 2{beside} on {self.reporting}"
            f" instructions that chose nothing, by {self.judge} {self.version} ({self.model}, {self.site}{said})"
        )

    def tables(self) -> dict[str, Table]:
        arms = [
            Column("arm", "arm", whole=True),
            Column("score", "score", INTERVAL, note="harmonic mean, 0 to 2"),
            Column("over random", "over_random", SIGNED, note="paired"),
            Column("read for other concepts", "of_others", INTERVAL),
            Column("concept", "concept", ".2f"),
            Column("instruction", "instruction", ".2f"),
            Column("fluency", "fluency", ".2f"),
            Column("ordinary texts", "ordinary", SHARE),
            Column("factor", "factor", NUMBER, note=f"median, in {self.unit}", spare=1),
            Column("concepts", "concepts", COUNT, spare=2),
            Column("not judged", "gaps", COUNT, note="answers", spare=3),
        ]
        concepts = [
            Column("concept", "concept"),
            Column("meaning", "meaning", spare=1),
            Column("arm", "arm", whole=True),
            Column("feature", lambda row: "" if row.feature is None else str(row.feature)),
            Column("factor", "factor", NUMBER),
            Column("score", "score", INTERVAL),
            Column("not judged", "gaps", COUNT, spare=2),
        ]
        caption = (
            f"Judge: {self.judge}, version {self.version}, {right_on(self.judge_accuracy)}."
            f" Each concept's factor was chosen on {self.choosing}"
            f" instructions; scores are of {self.reporting} others, intervals over both these and concepts."
            + " Half of each concept's exemplars are the judge's; arms are fitted on the others."
            * self.halved
        )
        check = [
            Column("of", lambda row: row[0]),
            Column("refused", lambda row: row[1], INTERVAL),
        ]
        rows = [(name, getattr(self.fluency_check, name)) for name in ("unsteered", "loops", "spam", "shuffled")]
        selection = {} if self.selection is None else self.selection.tables()
        return {
            "arms": Table(columns=arms, rows=self.arms, caption=caption),
            "concepts": Table(columns=concepts, rows=self.concepts, group=lambda row: row.concept),
            "fluency": Table(
                columns=check, rows=rows, title="texts that count as not fluent",
                caption="Held-out answers of the model itself, and loops, spam and shuffled words made of them.",
            ),
            **selection,
        }  # fmt: skip

    def draw(self, ax: Axes) -> None:
        """Scores of arms with their intervals."""
        marks = [Mark(one.arm, one.score) for one in self.arms if one.score is not None]
        plot_intervals(ax, marks, "score, 0 to 2", ".3f")


def _text(score: Interval | None) -> str:
    return "no score" if score is None else f"{score:.3f}"


@dataclass(frozen=True, kw_only=True, repr=False)
class AxBench(AxBenchResult):
    """The same with every score and text."""

    by_arm: Mapping[str, ArmUtility]
    names: tuple[str, ...]
    """Of the concepts that were judged, in the order of `by_arm`."""
    instructions: tuple[str, ...]
    """Those to choose on first."""

    @property
    def result(self) -> AxBenchResult:
        """What a run keeps of it beside its files."""
        return AxBenchResult(**part_of(self, AxBenchResult))

    def answers(self) -> dict[str, list[Any]]:
        """Every answer with its scores, a column each; None where there is no judgement."""
        found: dict[str, list[Any]] = {name: [] for name in _ANSWER}
        for one in self.by_arm.values():
            for c, d, i in np.ndindex(one.ordinary.shape):
                if one.texts[c][d][i] is None:
                    continue
                scores = [None if np.isnan(each) else float(each) for each in one.scores[c, d, i]]
                overall = None if None in scores else float(one.overall[c, d, i])
                row = (
                    one.arm, self.names[c], one.features[c], one.factors[d], self.instructions[i], i >= self.choosing,
                    one.texts[c][d][i], bool(one.ordinary[c, d, i]), *scores, overall,
                )  # fmt: skip
                for name, value in zip(_ANSWER, row, strict=True):
                    found[name].append(value)
        return found

    def chosen_answers(self) -> list[dict[str, Any]]:
        """Of each concept and arm the answer to the first instruction that chose nothing, at the factor chosen."""
        found: list[dict[str, Any]] = []
        for one in self.concepts:
            if one.factor is not None:
                utility, c = self.by_arm[one.arm], self.names.index(one.concept)
                d = utility.factors.index(one.factor)
                found.append(
                    {"concept": one.concept, "arm": one.arm, "factor": one.factor,
                     "instruction": self.instructions[self.choosing], "answer": utility.texts[c][d][self.choosing],
                     "score": float(utility.overall[c, d, self.choosing])}
                )  # fmt: skip
        return found

    def read_for_others(
        self, judge: FeatureJudge, meanings: Sequence[Meaning], unsteered: Sequence[str], *, seed: int = 0
    ) -> AxBench:
        """The same with what the reported answers score where they are read for other concepts: what an arm has more is
        due to the concept.

        Args:
            judge: reads the answers that chose nothing, each at the factor of its concept and arm.
            meanings: `[C]`
            unsteered: `[I]` the model's own answers.
            seed: of which concept stands in for which.
        """
        if len(meanings) < 2:
            return self
        shuffled = shuffled_meanings(meanings, seed)
        arms: list[ArmScore] = []
        for arm in self.arms:
            utility, reports = self.by_arm[arm.arm], range(self.choosing, len(self.instructions))
            factors = [one.factor for one in self.concepts if one.arm == arm.arm]
            at = [(c, utility.factors.index(f), i) for c, f in enumerate(factors) if f is not None for i in reports]
            asked = [
                ToRate(
                    meaning=shuffled[c], instruction=self.instructions[i], text=utility.texts[c][d][i] or "",
                    unsteered=unsteered[i],
                )
                for c, d, i in at
            ]  # fmt: skip
            scores = np.full((len(meanings), len(self.instructions)), np.nan)
            for (c, d, i), rating in zip(at, judge.rate(asked), strict=True):
                if not isinstance(rating, Unjudged):
                    scores[c, i] = rating._replace(fluency=rating.fluency * utility.ordinary[c, d, i]).overall
            arms.append(replace(arm, of_others=over_both(scores[:, self.choosing :])))
        return replace(self, arms=tuple(arms))

    def select(self, rankings: Mapping[str, ArrayLike], arm: str = "features") -> NestedSelection:
        """Whether criteria find what steers better; see `select_nested`.

        Args:
            rankings: by criterion the score of each concept's feature, in order.
            arm: whose answers say what steers.

        Raises:
            UserError: there is no such arm, or as `select_nested` says.
        """
        utility = named(self.by_arm, arm, "arm").overall
        return select_nested(utility, rankings, np.arange(utility.shape[2]) < self.choosing)


def make_result(
    ground: Ground, judge: FeatureJudge, instructions: Instructions, unit: str, check: FluencyCheck,
    unexplained: Mapping[str, str], arms: Sequence[ArmUtility], *, halved: bool = False,
    calibration: JudgeCalibration | None = None,
) -> AxBench:  # fmt: skip
    """Choose factors, and report where they were not chosen."""
    chosen = {one.arm: _Chosen(one, len(instructions.choosing)) for one in arms}
    random = chosen.get("random")
    concepts = tuple(
        chosen[one.arm].concept_score(i, concept.name, ground.meanings[i].text)
        for i, concept in enumerate(ground.concepts)
        for one in arms
    )
    return AxBench(
        model=ground.model.name, site=str(ground.site), unit=unit, judge=judge.name, version=judge.version,
        choosing=len(instructions.choosing), reporting=len(instructions.reporting),
        arms=tuple(one.arm_score(random) for one in chosen.values()), concepts=concepts,
        unexplained=tuple(unexplained.items()), fluency_check=check, halved=halved,
        judge_accuracy=None if calibration is None else calibration.rates.accuracy,
        by_arm={one.arm: one for one in arms}, names=tuple(one.name for one in ground.concepts),
        instructions=instructions.all,
    )  # fmt: skip


class _Chosen:
    """An arm with each concept at the factor that does best on the first instructions."""

    def __init__(self, one: ArmUtility, choosing: int) -> None:
        self.one, self.gaps, overall = one, one.gaps, one.overall
        self.place, self.known = best_factor(overall[:, :, :choosing])
        rows = np.arange(len(overall))
        self.reported = overall[rows, self.place, choosing:]  # [C, reporting]
        self.reported[~self.known] = np.nan
        self.parts = one.scores[rows, self.place, choosing:]
        self.ordinary: NDArray[np.bool_] = one.ordinary[rows, self.place, choosing:]

    def concept_score(self, i: int, name: str, meaning: str) -> ConceptScore:
        values = self.reported[i][np.isfinite(self.reported[i])]
        return ConceptScore(
            concept=name, arm=self.one.arm, meaning=meaning, feature=self.one.features[i],
            factor=self.one.factors[self.place[i]] if self.known[i] else None,
            score=student_mean(values) if len(values) else None,
            gaps=int(self.gaps[i]),
        )  # fmt: skip

    def arm_score(self, random: _Chosen | None) -> ArmScore:
        judged = np.isfinite(self.reported).any(axis=1)
        concept, instruction, fluency = (column_mean(self.parts[judged][..., k].ravel()) for k in range(3))
        over = None
        if random is not None and random is not self:
            over = over_both(self.reported - random.reported)
        return ArmScore(
            arm=self.one.arm, concepts=int(judged.sum()), score=over_both(self.reported), over_random=over,
            concept=float(concept), instruction=float(instruction), fluency=float(fluency),
            ordinary=float(self.ordinary[judged].mean()) if judged.any() else np.nan,
            factor=float(np.median(np.array(self.one.factors)[self.place[judged]])) if judged.any() else np.nan,
            gaps=int(self.gaps.sum()),
        )  # fmt: skip


def best_factor(overall: Floats) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Places `[C]` of the factors that do best, and whether anything says so; of `[C, D, choosing]` scores."""
    return best_dose(column_mean(overall))


def harmonic_means(scores: Floats) -> Floats:
    """Of the last axis: 0 where one score is."""
    with np.errstate(divide="ignore"):
        return np.where((scores <= 0).any(axis=-1), 0.0, 3 / (1 / scores).sum(axis=-1))


def over_both(values: Floats) -> Interval | None:
    """The mean over concepts of means over instructions, with an interval that speaks of other ones of both.

    A concept without any value is left out. A single missing one takes, for the bounds alone, what its row and column
    lead to expect.

    Args:
        values: `[C, I]`, NaN where there is none.
    """
    values = values[np.isfinite(values).any(axis=1)]
    values = values[:, np.isfinite(values).any(axis=0)] if len(values) else values
    if not values.size:
        return None
    rows, columns = column_mean(values), column_mean(values.T)
    filled = np.where(np.isfinite(values), values, rows[:, None] + columns - column_mean(values.ravel()))
    estimate = float(rows.mean())
    if len(values) < 2:
        return student_mean(filled[0])
    found = crossed_mean(filled.T) if filled.shape[1] > 1 else bootstrap_mean(filled[:, 0])
    shift = estimate - found.estimate
    return Interval(
        estimate=estimate, low=found.low + shift, high=found.high + shift, n=len(values), method=found.method
    )
