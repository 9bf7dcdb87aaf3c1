"""How often a judge of features is right, on texts whose concepts are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.interpreting.judge import FeatureJudge, Meaning, Rating, ToRate
from trimtab.interpreting.judges.rating import as_passage
from trimtab.interpreting.labelled_texts import KINDS, LabelledConcept, LabelledText
from trimtab.judges import Unjudged
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, INTERVAL, Column, Table
from trimtab.stats import Interval, Resamples, number_text
from trimtab.stats.resamples import auc, balanced, ratio

BROKEN: dict[str, Callable[[str, np.random.Generator], str]] = {
    "as written": lambda text, rng: text,
    "a loop": lambda text, rng: " ".join(text.split()[:6] * 12),
    "one word again and again": lambda text, rng: " ".join([_longest(text)] * 40),
    "keywords alone": lambda text, rng: " ".join(word for word in text.split() if len(word) > 6),
    "shuffled words": lambda text, rng: " ".join(rng.permutation(text.split()).tolist()),
}
"""What fluency is measured on: texts, and what is made of them."""
RATED_AGAIN = 400
"""Texts, drawn among all, that are rated for another instruction as well, and broken in each way."""


@dataclass(frozen=True, kw_only=True)
class Right:
    """How often a judge is right about a concept; intervals are over concepts."""

    what: str
    """`fires`: whether the feature fires somewhere in a text. `rates`: whether a steered text has the concept more than
    the unsteered one, at a concept score of 1 or more."""
    accuracy: Interval
    """Mean of the shares of right decisions on texts that have the concept and on those that lack it: 0.5 is chance."""
    auc: Interval


@dataclass(frozen=True, kw_only=True)
class RightOnKind:
    """The same on texts of one kind."""

    kind: str
    texts: int
    fires: Interval
    """Share of right decisions about where the feature fires."""
    rates: Interval
    """Share of right decisions about whether a text has the concept."""


@dataclass(frozen=True, kw_only=True)
class FluencyOf:
    """What a judge says of the fluency of texts that were broken in a known way."""

    made: str
    texts: int
    fluency: Interval
    """Mean, of 2."""


@dataclass(frozen=True, kw_only=True, repr=False)
class JudgeCalibration(Result):
    """What a judge of features is worth."""

    judge: str
    version: str
    concepts: int
    texts: int
    """Tested in all."""
    unjudged: int
    """Concepts or texts on which it said nothing; they count nowhere."""
    seed: int
    right: tuple[Right, ...]
    kinds: tuple[RightOnKind, ...]
    instruction: Interval
    """How often the rating of a text for its own instruction is above that for another (AUC); 0.5 is chance."""
    fluency: tuple[FluencyOf, ...]
    run: Path | None = None

    @property
    def fires(self) -> Right:
        return self.right[0]

    @property
    def rates(self) -> Right:
        return self.right[1]

    @property
    def of(self) -> str:
        """The judge in words."""
        return f"{self.judge}, version {self.version}"

    def check_of(self, judge: FeatureJudge) -> None:
        """Raise a `UserError` if it is of another judge."""
        if (self.judge, self.version) != (judge.name, judge.version):
            why = f"the judge is {judge.name}, version {judge.version}"
            raise UserError(f"the calibration of {self.of}", why, "calibrate this judge")

    def headline(self) -> str:
        gaps = f"; {self.unjudged} not judged" if self.unjudged else ""
        return (
            f"judge {self.judge}, version {self.version}, "
            f"on {self.texts:,} labelled texts of {self.concepts} concepts: "
            f"accuracy {number_text(self.fires.accuracy, INTERVAL)} on where a feature fires, "
            f"{number_text(self.rates.accuracy, INTERVAL)} on whether a text has the concept (0.5 is chance){gaps}"
        )

    def tables(self) -> dict[str, Table]:
        right = [Column("question", "what"), Column("accuracy", "accuracy", INTERVAL), Column("AUC", "auc", INTERVAL)]
        kinds = [
            Column("texts that are", "kind", whole=True),
            Column("texts", "texts", COUNT),
            Column("right on where it fires", "fires", INTERVAL),
            Column("right on whether they have it", "rates", INTERVAL),
        ]
        fluency = [
            Column("text", "made", whole=True),
            Column("texts", "texts", COUNT),
            Column("fluency", "fluency", ".2f", note="of 2"),
        ]
        own = Column("own instruction rated above another", "instruction", INTERVAL, note="AUC")
        return {
            "right": Table(columns=right, rows=self.right, caption="Intervals are over concepts."),
            "kinds": Table(columns=kinds, rows=self.kinds),
            "instruction": Table(columns=[own], rows=[self]),
            "fluency": Table(columns=fluency, rows=self.fluency),
        }


def right_on(accuracy: Interval | None) -> str:
    """What is known of a judge, in words that follow its name."""
    if accuracy is None:
        return "not measured on labelled texts"
    return f"itself right on {number_text(accuracy, INTERVAL)} of labelled texts"


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What a judge said of some texts, row by row."""

    concept: NDArray[np.int64]
    kind: NDArray[np.int64]
    fires: NDArray[np.float64]
    """Probability; NaN where it said nothing, as in what follows."""
    rates: NDArray[np.float64]
    """Concept score less 1, so that 0 and more says that it is there."""
    own: NDArray[np.float64]
    """Rating for its own instruction."""
    again: NDArray[np.bool_]
    """The texts that were rated for another instruction, too, and broken."""
    other: NDArray[np.float64]
    """Rating for another instruction."""
    fluency: NDArray[np.float64]
    """`[N, len(BROKEN)]`"""


def calibrate(judge: FeatureJudge, labelled: Sequence[LabelledConcept], *, seed: int = 0) -> JudgeCalibration:
    """How often a judge is right on labelled texts.

    It explains each concept by its exemplars, and then says of each text whether the feature fires in it, and rates it
    as a steered text beside a plain answer to another instruction.

    Args:
        judge: which.
        labelled: concepts and their texts; see `read_axbench`.
        seed: of plain answers, broken texts and the bootstrap.

    Raises:
        UserError: there is no concept, or the judge said nothing of any.
    """
    if not labelled:
        raise UserError("the labelled texts", "there is no concept", "give some")
    meanings = judge.explain([one.exemplars for one in labelled])
    known = [(number, m) for number, m in enumerate(meanings) if isinstance(m, Meaning)]
    if not known:
        reason = next(m.reason for m in meanings if isinstance(m, Unjudged))
        raise UserError(f"judge {judge.name}", f"it explained no concept ({reason})", "choose another judge")
    said = _ask(judge, labelled, known, seed)
    heard = np.isfinite(said.fires) & np.isfinite(said.rates)
    if not heard.any():
        raise UserError(f"judge {judge.name}", "it judged no text", "choose another judge")
    resamples, yes = Resamples(said.concept[heard], seed=seed), said.kind[heard] == KINDS.index("positive")
    again = said.again & heard & np.isfinite(said.other) & np.isfinite(said.fluency).all(axis=1)
    broken = Resamples(said.concept[again], seed=seed)
    fires, rates = said.fires[heard], said.rates[heard]
    decided = fires > 0.5, rates >= 0
    pairs, is_own = np.concatenate([said.own[again], said.other[again]]), np.arange(2 * again.sum()) < again.sum()
    paired = Resamples(np.tile(said.concept[again], 2), seed=seed)
    return JudgeCalibration(
        judge=judge.name,
        version=judge.version,
        concepts=len(known),
        texts=int(heard.sum()),
        unjudged=int((~heard).sum()) + len(labelled) - len(known),
        seed=seed,
        right=tuple(
            Right(
                what=what,
                accuracy=resamples.of(partial(balanced, said_so, yes)).interval,
                auc=resamples.of(partial(auc, score, yes)).interval,
            )
            for what, said_so, score in zip(("fires", "rates"), decided, (fires, rates), strict=True)
        ),
        kinds=tuple(
            _on_kind(kind, said.kind[heard] == number, decided, yes, resamples)
            for number, kind in enumerate(KINDS)
            if (said.kind[heard] == number).any()
        ),
        instruction=paired.of(partial(auc, pairs, is_own)).interval,
        fluency=tuple(
            FluencyOf(
                made=made,
                texts=int(again.sum()),
                fluency=broken.of(partial(ratio, said.fluency[again, column], np.ones(again.sum()))).interval,
            )
            for column, made in enumerate(BROKEN)
        ),
    )


def _on_kind(
    kind: str,
    rows: NDArray[np.bool_],
    decided: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    yes: NDArray[np.bool_],
    resamples: Resamples,
) -> RightOnKind:
    among = resamples.among(rows)
    fires, rates = (among.of(partial(ratio, (one == yes)[rows], np.ones(rows.sum()))).interval for one in decided)
    return RightOnKind(kind=kind, texts=int(rows.sum()), fires=fires, rates=rates)


def _ask(
    judge: FeatureJudge, labelled: Sequence[LabelledConcept], known: Sequence[tuple[int, Meaning]], seed: int
) -> _Said:
    rng = np.random.default_rng(seed)
    texts = [(number, meaning, text) for number, meaning in known for text in labelled[number].texts]
    fires = judge.fires(
        [meaning for _, meaning in known],
        [[as_passage(text.text) for text in labelled[number].texts] for number, _ in known],
    )
    probabilities = [
        np.full(len(labelled[number].texts), np.nan) if isinstance(found, Unjudged) else found
        for (number, _), found in zip(known, fires, strict=True)
    ]
    plain = [str(rng.choice(labelled[number].plain)) for number, _, _ in texts]
    again = np.sort(rng.permutation(len(texts))[:RATED_AGAIN]).tolist()

    def rated(rows: Sequence[int], make: Callable[[str], str], asked: Sequence[int]) -> list[Rating | Unjudged]:
        return list(
            judge.rate(
                [
                    ToRate(
                        meaning=texts[row][1],
                        instruction=texts[instruction][2].instruction,
                        text=make(texts[row][2].text),
                        unsteered=plain[row],
                    )
                    for row, instruction in zip(rows, asked, strict=True)
                ]
            )
        )

    every = range(len(texts))
    own = rated(every, lambda text: text, every)
    other = rated(again, lambda text: text, [_another(row, again, texts) for row in again])
    fluency = np.full((len(texts), len(BROKEN)), np.nan)
    for column, make in enumerate(BROKEN.values()):
        ratings = (
            rated(again, lambda text, make=make: make(text, rng), again) if column else [own[row] for row in again]
        )
        fluency[again, column] = _numbers(ratings, "fluency")
    return _Said(
        concept=np.array([number for number, _, _ in texts]),
        kind=np.array([KINDS.index(text.kind) for _, _, text in texts]),
        fires=np.concatenate(probabilities),
        rates=_numbers(own, "concept") - 1,
        own=_numbers(own, "instruction"),
        again=np.isin(np.arange(len(texts)), again),
        other=_spread(_numbers(other, "instruction"), again, len(texts)),
        fluency=fluency,
    )


def _another(row: int, rows: Sequence[int], texts: Sequence[tuple[int, Meaning, LabelledText]]) -> int:
    """The next but half of the rows round whose text answers another instruction; itself if all answer the same."""
    start = rows.index(row) + len(rows) // 2
    around = (rows[(start + i) % len(rows)] for i in range(len(rows)))
    return next((one for one in around if texts[one][2].instruction != texts[row][2].instruction), row)


def _spread(values: NDArray[np.float64], rows: Sequence[int], count: int) -> NDArray[np.float64]:
    """Values at their rows, NaN elsewhere."""
    found = np.full(count, np.nan)
    found[list(rows)] = values
    return found


def _numbers(ratings: Sequence[Rating | Unjudged], name: str) -> NDArray[np.float64]:
    return np.array([np.nan if isinstance(one, Unjudged) else getattr(one, name) for one in ratings])


def _longest(text: str) -> str:
    return max(text.split(), key=len, default="word")
