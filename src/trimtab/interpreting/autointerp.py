"""How well a judge tells where features fire, by what it makes of other windows of them (SAEBench's autointerp).

Saying that a feature fires nowhere is right on 10 of 14 windows; that chance stands beside every score, as do what the
same judge scores with explanations of other features, balanced accuracy and AUC, of which 0.5 is chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.feature_examples import FeatureExamples
from trimtab.errors import UserError
from trimtab.interpreting.calibration import JudgeCalibration, right_on
from trimtab.interpreting.judge import FeatureJudge, Meaning, shuffled_meanings
from trimtab.interpreting.scoring_windows import (
    HOW,
    SilentWindows,
    Trial,
    WindowOptions,
    check_wide_enough,
    make_trial,
)
from trimtab.judges import Unjudged
from trimtab.lm import LanguageModel
from trimtab.runs import field_types, read_keywords, whole_number, whole_numbers, write_table
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, INTERVAL, SIGNED, Column, Table
from trimtab.stats import Interval, Resamples, number_text
from trimtab.stats.resamples import auc, balanced, ratio

SAID = 0.5
"""A feature is said to fire where the judge gives a higher probability."""


@dataclass(frozen=True, kw_only=True)
class FeatureScore:
    """How well one feature's explanation tells where it fires."""

    feature: int
    score: float
    """Accuracy over the windows to test on."""
    balanced: float
    """Mean of the shares of right decisions on windows in which it fires and in which it is silent."""
    auc: float
    """How often a window in which it fires is thought likelier than one in which it is silent."""
    shuffled: float
    """Accuracy with another feature's explanation."""
    shuffled_balanced: float
    shuffled_auc: float
    explanation: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measure over features; intervals resample features."""

    measure: str
    own: Interval
    shuffled: Interval
    """With explanations of other features."""
    difference: Interval
    """Own less shuffled, paired by feature."""
    chance: float
    """Of saying that no feature fires anywhere."""


@dataclass(frozen=True, kw_only=True, repr=False)
class AutointerpResult(Result):
    """How interpretable some features are to a judge."""

    judge: str
    version: str
    judge_accuracy: Interval | None
    """Of the judge on labelled texts, where it was measured."""
    model: str
    site: str
    dictionary: str
    """Fingerprint."""
    chance: float
    """Accuracy of saying that no feature fires anywhere."""
    checked: bool
    """Whether the model read the windows that count as silent; otherwise only no place where a feature is known to fire
    is near."""
    measures: tuple[Measured, ...]
    """Accuracy, balanced accuracy, AUC."""
    scores: tuple[FeatureScore, ...]
    """Features ascending."""
    gaps: dict[str, int]
    """Features that were looked at and have no score, by the reason; they count nowhere."""
    options: WindowOptions
    run: Path | None = None

    @property
    def accuracy(self) -> Measured:
        return self.measures[0]

    def headline(self) -> str:
        own, other = (number_text(one, INTERVAL) for one in (self.accuracy.own, self.accuracy.shuffled))
        gaps = sum(self.gaps.values())
        return (
            f"{len(self.scores)} features at {self.site} of {self.model}: accuracy {own}; {self.chance:.3f} by saying "
            f"none, {other} with explanations of other features; judge {self.judge}, version {self.version}, "
            f"{right_on(self.judge_accuracy)}" + (f"; {gaps} features have no score" if gaps else "")
        )

    def tables(self) -> dict[str, Table]:
        measures = [
            Column("measure", "measure", whole=True),
            Column("score", "own", INTERVAL),
            Column("explanations of others", "shuffled", INTERVAL),
            Column("difference", "difference", SIGNED),
            Column("saying none", "chance", ".3f"),
        ]
        features = [
            Column("feature", "feature", "d"),
            Column("accuracy", "score", ".3f"),
            Column("balanced", "balanced", ".3f"),
            Column("AUC", "auc", ".3f"),
            Column("with another's", "shuffled", ".3f", spare=1),
            Column("explanation", "explanation"),
        ]
        gaps = [{"reason": reason, "features": count} for reason, count in self.gaps.items()]
        best = sorted(self.scores, key=lambda one: (-one.balanced, -one.auc, one.feature))
        shown = [*best[:SHOWN], *best[max(SHOWN, len(best) - SHOWN) :]]
        found = {
            "measures": Table(columns=measures, rows=self.measures, caption="Intervals are over features."),
            "features": Table(columns=features, rows=shown, title=f"The {SHOWN} best and worst"),
            "gaps": Table(columns=[Column("no score because of", "reason"), Column("features", "features", COUNT)],
                          rows=gaps),
        }  # fmt: skip
        return {name: table for name, table in found.items() if table.rows}

    def to_table(self) -> pa.Table:
        """One row per feature."""
        names = list(field_types(FeatureScore))
        return pa.table({name: [getattr(one, name) for one in self.scores] for name in names})

    def write(self, path: str | Path) -> None:
        """Write the features' scores as Parquet. Raises `UserError` if the disk refuses."""
        write_table(path, self.to_table())


SHOWN = 10
"""Features of either end in the table."""


def read_scores(path: str | Path) -> list[FeatureScore]:
    """The scores that a run keeps in `autointerp.parquet`.

    Raises:
        UserError: the file is missing or is another kind of table.
    """
    try:
        return [FeatureScore(**row) for row in pq.read_table(path).to_pylist()]
    except (OSError, pa.ArrowException, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(str(path), f"not readable as scores of features ({reason})", "run autointerp again") from error


def autointerp(
    examples: FeatureExamples,
    judge: FeatureJudge,
    *,
    features: int | Sequence[int] | None = None,
    model: LanguageModel | None = None,
    dictionary: Dictionary | None = None,
    calibration: JudgeCalibration | None = None,
    **options: Any,
) -> AutointerpResult:
    """How well a judge tells where features fire.

    Args:
        examples: windows in which each feature fires; `trimtab examples` says how to come by enough.
        judge: explains each feature by some of them, and then says of others, and of windows in which the feature is
            silent, whether it fires there.
        features: ids; or how many to draw among those that have enough windows; all of them by default.
        model, dictionary: with both, windows count as silent only if the feature does not fire when the model reads
            them by themselves.
        calibration: how often the judge is right on labelled texts; see `calibrate`.
        options: fields of `WindowOptions`.

    Raises:
        UserError: windows are too narrow, a feature does not exist, no feature has enough windows, or the judge says
            nothing of any.
    """
    chosen = WindowOptions(**read_keywords(options, field_types(WindowOptions), autointerp))
    check_wide_enough(examples, chosen.window)
    if calibration is not None:
        calibration.check_of(judge)
    trials, gaps = _trials(examples, features, chosen, model, dictionary)
    explained = judge.explain([trial.exemplars for trial in trials])
    known = [(trial, m) for trial, m in zip(trials, explained, strict=True) if isinstance(m, Meaning)]
    if len(known) < 2:
        said = next((m.reason for m in explained if isinstance(m, Unjudged)), "one feature cannot be compared")
        raise UserError(
            f"judge {judge.name}", f"it explained {len(known)} features ({said})", "give more windows or features"
        )
    meanings = [meaning for _, meaning in known]
    passages = [trial.passages for trial, _ in known]
    own = judge.fires(meanings, passages)
    other = judge.fires(shuffled_meanings(meanings, chosen.seed), passages)
    gaps += [m.reason for m in explained if isinstance(m, Unjudged)]
    rows: list[_Row] = []
    for (trial, meaning), mine, others in zip(known, own, other, strict=True):
        if isinstance(mine, Unjudged):
            gaps.append(mine.reason)
        elif isinstance(others, Unjudged):
            gaps.append(others.reason)
        else:
            rows.append(_Row(trial, meaning, mine, others))
    if not rows:
        raise UserError(f"judge {judge.name}", f"it said of no feature where it fires ({gaps[-1]})", "choose another")
    return AutointerpResult(
        judge=judge.name,
        version=judge.version,
        judge_accuracy=None if calibration is None else calibration.fires.accuracy,
        model=examples.model,
        site=examples.site,
        dictionary=examples.dictionary,
        chance=chosen.chance,
        checked=model is not None and dictionary is not None,
        measures=_measures(rows, chosen),
        scores=tuple(sorted((row.score for row in rows), key=lambda one: one.feature)),
        gaps={reason: gaps.count(reason) for reason in dict.fromkeys(gaps)},
        options=chosen,
    )


class _Row:
    """A feature and what was said of its windows by its own explanation and by another's."""

    def __init__(self, trial: Trial, meaning: Meaning, own: NDArray[np.float64], other: NDArray[np.float64]) -> None:
        self.measured = [_measure(said, trial.fires) for said in (own, other)]
        (score, even, area), (shuffled, shuffled_even, shuffled_area) = self.measured
        self.score = FeatureScore(
            feature=trial.feature, score=score, balanced=even, auc=area, shuffled=shuffled,
            shuffled_balanced=shuffled_even, shuffled_auc=shuffled_area, explanation=meaning.text,
        )  # fmt: skip


def _measure(said: NDArray[np.float64], fires: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Accuracy, balanced accuracy and AUC on one feature's windows."""
    once = np.ones((1, len(fires)))
    decided = said > SAID
    right = float(np.mean(decided == fires))
    return right, float(balanced(decided, fires, once)[0]), float(auc(said, fires, once)[0])


def _measures(rows: Sequence[_Row], options: WindowOptions) -> tuple[Measured, ...]:
    resamples = Resamples(np.arange(len(rows)), seed=options.seed)
    found: list[Measured] = []
    for place, (measure, chance) in enumerate((("accuracy", options.chance), ("balanced accuracy", 0.5), ("AUC", 0.5))):
        own, other = (
            resamples.of(partial(ratio, [row.measured[which][place] for row in rows], np.ones(len(rows))))
            for which in (0, 1)
        )
        found.append(
            Measured(
                measure=measure,
                own=own.interval,
                shuffled=other.interval,
                difference=(own - other).interval,
                chance=chance,
            )
        )
    return tuple(found)


def _trials(
    examples: FeatureExamples,
    features: int | Sequence[int] | None,
    options: WindowOptions,
    model: LanguageModel | None,
    dictionary: Dictionary | None,
) -> tuple[list[Trial], list[str]]:
    """Windows of features, and why some of those that were named have none."""
    count = None if features is None or not isinstance(features, int) else whole_number(features, "features", 2)
    drawn = np.random.default_rng([options.seed, 0]).permutation(examples.live).tolist()
    ids = drawn if features is None or count is not None else whole_numbers(features, "feature")
    for one in ids:
        _ = examples[one]
    silent = SilentWindows(examples, ids, options, model, dictionary)
    trials: list[Trial] = []
    gaps: list[str] = []
    for one in ids:
        trial = make_trial(examples, one, silent, options)
        if isinstance(trial, Unjudged):
            gaps.append(trial.reason)
        else:
            trials.append(trial)
        if count is not None and len(trials) == count:
            break
    if not trials:
        why = f"no feature has enough windows ({gaps[0]})" if gaps else "no feature fires in them"
        raise UserError(f"the examples at {examples.site or 'a site'}", why, f"make others ({HOW})")
    return trials, gaps
