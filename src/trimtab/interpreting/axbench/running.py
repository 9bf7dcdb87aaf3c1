"""Steer towards concepts by several arms, let a judge read what was written, and keep what is done."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError, named
from trimtab.interpreting.axbench.arms import ARMS, Aim, Ground
from trimtab.interpreting.axbench.concepts import Concept, are_fitted, share_out
from trimtab.interpreting.axbench.result import ArmUtility, AxBench, best_factor, harmonic_means, make_result
from trimtab.interpreting.axbench.writing import OwnArm, Text, Writer
from trimtab.interpreting.calibration import JudgeCalibration
from trimtab.interpreting.instructions import Instructions
from trimtab.interpreting.judge import Exemplars, FeatureJudge, Meaning, PaidJudge, Rating, ToRate
from trimtab.judges import Unjudged
from trimtab.lm import DecodingConfig, LanguageModel, PositionRule
from trimtab.runs import Meter, config_dict, read_json, text_id, write_json
from trimtab.steering import Unit
from trimtab.steering.doses import check_unit

PROMPT = "prompt"
ROWS = 4000
"""Answers that are written together at most, unless one concept has more."""


@dataclass(frozen=True, kw_only=True)
class AxBenchOptions(DecodingConfig):
    """How to steer and write."""

    arm: tuple[str, ...] = ("features", "random", "mean-difference", "probe", "prompt")
    """features, random, mean-difference, probe, rank-one, prompt; each brings the same concepts about."""
    factor: tuple[float, ...] = (0.4, 0.8, 1.2, 2.0, 4.0)
    """Doses that are tried, in `unit`; each concept's is chosen on half of the instructions."""
    unit: Unit = "max_activation"
    """What factors are multiples of: max_activation (the largest activation of a feature, or the largest projection of
    a concept's texts), relative (the activation's norm) or absolute (1)."""
    positions: str = "generated"
    """Which positions are steered: generated, prompt, all, START:STOP, or a list."""
    max_new_tokens: int = 48
    """Tokens of an answer at most."""
    temperature: float = 1.0
    """0 decodes greedily; otherwise logits are divided by this."""
    batch_size: int = field(default=96)
    """Answers that are written side by side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.arm or len(set(self.arm)) < len(self.arm):
            raise UserError("the arms", "there is none, or one is named twice", "name each once")
        if not self.factor or len(set(self.factor)) < len(self.factor) or not np.isfinite(self.factor).all():
            raise UserError("the factors", "they must be different finite numbers", "give some like 0.4 0.8 1.6")
        PositionRule.parse(self.positions)


def axbench(
    model: LanguageModel,
    concepts: Sequence[Concept],
    judge: FeatureJudge,
    instructions: Instructions,
    *,
    site: str = "",
    dictionary: Dictionary | None = None,
    own_arms: Sequence[OwnArm] = (),
    options: AxBenchOptions | None = None,
    calibration: JudgeCalibration | None = None,
    keep: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> AxBench:
    """Steer towards concepts, and let a judge read the answers.

    Each concept's factor is the one of the highest mean score on the instructions to choose on, and its score is the
    mean on the others, to which answers are written at this factor alone. A score is the harmonic mean of the judge's
    three; that of fluency counts 0 where a text is not ordinary (see `Text`). What the judge does not judge is counted,
    and is no 0. Where an arm is fitted on exemplars, it is given every second one of each concept, and the judge the
    others.

    Args:
        model: the model.
        concepts: what to bring about.
        judge: says what concepts mean, and reads answers for them.
        instructions: to choose on and to report on.
        site: where to steer; the dictionary's by default.
        dictionary: whose features steer.
        own_arms: further arms with models of their own.
        options: everything else.
        calibration: how often the judge is right on labelled texts; see `calibrate`.
        keep: directory in which finished answers and ratings are kept, a file for each concept, so that the same call
            goes on there. It asks again for judgements that are missing, of concepts as of answers.
        say: told what is to be done before it begins; by default it is printed to stderr.

    Raises:
        UserError: an arm or a site is unknown, an arm needs an SAE or its statistics, no concept can be judged, or what
            is kept was made of something else.
    """
    options = options or AxBenchOptions()
    if calibration is not None:
        calibration.check_of(judge)
    own = {arm.name: arm for arm in own_arms}
    for name in options.arm:
        if name != PROMPT:
            named({**ARMS, **own, PROMPT: None}, name, "arm")
    arms = (*options.arm, *(name for name in own if name not in options.arm))
    halved = are_fitted(arms, concepts)
    parts = share_out(concepts, halved=halved)
    explained = explain(judge, parts)
    gaps = {c.name: m.reason for c, m in zip(concepts, explained, strict=True) if isinstance(m, Unjudged)}
    if len(gaps) == len(concepts):
        why = f"the judge explains none ({next(iter(gaps.values()), 'there are none')})"
        raise UserError("the concepts", why, "give more texts or windows (trimtab examples --top 20 --weighted 16)")
    place = model.site(site or (dictionary.info.site if dictionary is not None else ""))
    if dictionary is not None and {"features", "random"} & set(arms):
        check_unit(options.unit, has_statistics=dictionary.feature_stats is not None)
    chat = bool(getattr(model.tokenizer, "chat_template", None))
    usual = {PROMPT: (1.0,)} | {name: arm.factors for name, arm in own.items()}
    factors = {name: usual.get(name, options.factor) for name in arms}
    made_from = text_id(
        json.dumps(
            [config_dict(replace(options, batch_size=1)), [c.fingerprint for c in concepts], instructions.all,
             str(place), judge.name, judge.version, model.fingerprint,
             "" if dictionary is None else dictionary.fingerprint,
             [[name, arm.model.fingerprint, arm.factors] for name, arm in own.items()]]
        )
    )  # fmt: skip
    judged: list[_Judged] = []
    for number, (part, meaning) in enumerate(zip(parts, explained, strict=True)):
        if not isinstance(part, Unjudged) and not isinstance(meaning, Unjudged):
            file = None if keep is None else _file(keep, number)
            kept = None if file is None else _read(file, made_from)
            # Answers are rated by what they were first rated by, should the judge now put it otherwise.
            meaning = meaning if kept is None else replace(meaning, text=kept["meaning"])
            judged.append(_Judged(part[0], meaning, file, kept))
    missing = [i for i, one in enumerate(judged) if one.kept is None]
    left = sum(one.unreported(len(instructions.choosing)) for one in judged)
    price = _Price(len(missing), left, factors, instructions, options.max_new_tokens)
    with Meter("unsteered answers") as meter:
        writer = Writer(
            model, place, instructions, options.decode_config(), chat=chat, positions=options.positions,
            unit=options.unit, progress=lambda n: meter.advance(n),
        )  # fmt: skip
        began = time.perf_counter()
        check = writer.check_fluency(options.seed)
        price.seconds_per_text = (time.perf_counter() - began) / writer.n_own
    if isinstance(judge, PaidJudge):
        # By the length of the model's own answers.
        own_answers = zip(writer.instructions, writer.unsteered, strict=True)
        like = [ToRate(meaning=judged[0].meaning, instruction=i, text=t, unsteered=t) for i, t in own_answers]
        price.judging = judge.cost(like) * price.texts / len(like)
    (say or _to_stderr)(str(price))
    if isinstance(judge, PaidJudge) and price.judging > judge.left:
        why = f"it costs about {price.judging:.4g}, and {judge.left:.4g} is left of the budget"
        hint = "raise it (--judge-option budget=…), or take fewer concepts, factors or instructions"
        raise UserError(f"judging {price.texts:,} answers", why, hint)
    ground = Ground(
        model=model, site=place, concepts=[one.concept for one in judged], meanings=[one.meaning for one in judged],
        prompts=writer.prompts[: len(instructions.choosing)], dictionary=dictionary, seed=options.seed,
    )  # fmt: skip
    pen = _Pen(judge, writer, judged, own, len(instructions.choosing), ground)
    _ask_again(judge, writer, [one for one in judged if one.kept is not None])
    with Meter("steered answers", price.texts) as meter:
        writer.progress = meter.advance
        kept = [i for i in range(len(judged)) if i not in missing]
        for start in range(0, len(kept), price.step):
            pen.report(kept[start : start + price.step], factors)
        for block in price.blocks:
            places = [missing[i] for i in block]
            texts = pen.rated([_Wanted(i, name, factors[name]) for i in places for name in arms], pen.choosing)
            for i, at in enumerate(places):
                judged[at].kept = {
                    "made_from": made_from, "meaning": judged[at].meaning.text,
                    "arms": dict(zip(arms, texts[i * len(arms) : (i + 1) * len(arms)], strict=True)),
                    "features": {name: pen.aim(name, at).feature for name in arms if name in ARMS},
                }  # fmt: skip
                judged[at].write()
            pen.report(places, factors)
    rows = [one.kept for one in judged if one.kept is not None]
    found = make_result(
        ground, judge, instructions, options.unit, check, gaps,
        [_joined(name, factors[name], rows, len(instructions.all)) for name in arms],
        halved=halved, calibration=calibration,
    )  # fmt: skip
    return found.read_for_others(judge, ground.meanings, writer.unsteered, seed=options.seed)


def explain(judge: FeatureJudge, parts: Sequence[tuple[Concept, Exemplars] | Unjudged]) -> list[Meaning | Unjudged]:
    """What concepts mean by the exemplars that are the judge's, in order; gaps stay gaps."""
    found = iter(judge.explain([part[1] for part in parts if not isinstance(part, Unjudged)]))
    return [part if isinstance(part, Unjudged) else next(found) for part in parts]


@dataclass(eq=False)
class _Judged:
    """A concept that the judge explains, with what is kept of it."""

    concept: Concept
    meaning: Meaning
    file: Path | None
    kept: dict[str, Any] | None
    """Answers by arm, factor and instruction; None before they are written."""

    def write(self) -> None:
        if self.file is not None:
            write_json(self.file, self.kept)

    def unreported(self, n_choosing: int) -> int:
        """Arms of which answers are kept, and none to the instructions that report."""
        arms = [] if self.kept is None else self.kept["arms"].values()
        return sum(all(len(texts) <= n_choosing for texts in by_factor) for by_factor in arms)


class _Price:
    """What is to be written."""

    def __init__(
        self, concepts: int, left: int, factors: dict[str, tuple[float, ...]], instructions: Instructions, tokens: int
    ) -> None:
        choosing, reporting = len(instructions.choosing), len(instructions.reporting)
        per_concept = choosing * sum(map(len, factors.values())) + reporting * len(factors)
        self.texts = concepts * per_concept + left * reporting
        self.tokens = self.texts * tokens
        self.step = max(1, ROWS // per_concept)
        """Concepts that are written of together."""
        self.blocks = [range(i, min(i + self.step, concepts)) for i in range(0, concepts, self.step)]
        self.seconds_per_text = self.judging = 0.0

    def __str__(self) -> str:
        minutes = self.texts * self.seconds_per_text / 60
        texts = f"{self.texts:,} answers to write and judge, of {self.tokens:,} tokens at most"
        judging = f", judging costs about {self.judging:.4g}" if self.judging else ""
        return f"{texts}; writing takes about {minutes:.0f} minutes{judging}"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _file(keep: Path, number: int) -> Path:
    return keep / f"answers-{number:04d}.json"


def _read(path: Path, made_from: str) -> dict[str, Any] | None:
    """Answers that were kept, if there are any. Raises a `UserError` if they were made otherwise."""
    kept = read_json(path)
    if kept is not None and kept.get("made_from") != made_from:
        why = "they were made of other concepts or instructions, or with other options or arms"
        raise UserError(f"answers in {path}", why, "give another directory")
    return kept


def _ask_again(judge: FeatureJudge, writer: Writer, judged: Sequence[_Judged]) -> None:
    """Ask for the judgements of kept answers that are missing."""
    gaps = [
        (one, text, ToRate(meaning=one.meaning, instruction=instruction, text=text["text"], unsteered=unsteered))
        for one in judged
        for by_factor in (one.kept or {})["arms"].values()
        for texts in by_factor
        # Of factors that were not chosen there are answers to the first instructions alone.
        for text, instruction, unsteered in zip(texts, writer.instructions, writer.unsteered, strict=False)
        if isinstance(text["scores"], str)
    ]
    if not gaps:
        return
    for (_, text, _), rating in zip(gaps, judge.rate([asked for *_, asked in gaps]), strict=True):
        text["scores"] = _scores(rating, text["ordinary"])
    for one in dict.fromkeys(one for one, *_ in gaps):
        one.write()


class _Wanted(NamedTuple):
    """Answers that are to be written."""

    place: int
    """Of the concept."""
    arm: str
    factors: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class _Pen:
    """Writes answers of arms, and has them rated."""

    judge: FeatureJudge
    writer: Writer
    judged: Sequence[_Judged]
    own: dict[str, OwnArm]
    n_choosing: int
    ground: Ground
    _aims: dict[str, list[Aim]] = field(default_factory=dict)

    @property
    def choosing(self) -> range:
        """Places of the instructions to choose on."""
        return range(self.n_choosing)

    def aim(self, arm: str, place: int) -> Aim:
        """An arm's direction for a concept; all of an arm are made when one is asked for."""
        if arm not in self._aims:
            self._aims[arm] = ARMS[arm](self.ground)
        return self._aims[arm][place]

    def rated(self, wanted: Sequence[_Wanted], which: range) -> list[list[list[dict[str, Any]]]]:
        """Texts with their scores, of some instructions, by what is wanted and by factor."""
        written = self._write(wanted, which)
        asked = [
            ToRate(
                meaning=self.judged[one.place].meaning, instruction=self.writer.instructions[i], text=text.text,
                unsteered=self.writer.unsteered[i],
            )
            for one, by_factor in zip(wanted, written, strict=True)
            for texts in by_factor
            for i, text in zip(which, texts, strict=True)
        ]  # fmt: skip
        ratings = iter(self.judge.rate(asked))
        return [[[_kept(one, next(ratings)) for one in texts] for texts in by_factor] for by_factor in written]

    def report(self, places: Sequence[int], factors: dict[str, tuple[float, ...]]) -> None:
        """Write to the instructions that report, at the factors that the others choose, where that is not done."""
        wanted: list[_Wanted] = []
        into: list[list[dict[str, Any]]] = []
        for place in places:
            for name, by_factor in (self.judged[place].kept or {})["arms"].items():
                scores = harmonic_means(
                    np.array([[_numbers(one) for one in texts[: self.n_choosing]] for texts in by_factor])
                )
                (chosen,), (known,) = best_factor(scores[None])
                if known and len(by_factor[chosen]) == self.n_choosing:
                    wanted.append(_Wanted(place, name, (factors[name][chosen],)))
                    into.append(by_factor[chosen])
        if not wanted:
            return
        reporting = range(self.n_choosing, len(self.writer.instructions))
        for texts, (more,) in zip(into, self.rated(wanted, reporting), strict=True):
            texts.extend(more)
        for place in dict.fromkeys(one.place for one in wanted):
            self.judged[place].write()

    def _write(self, wanted: Sequence[_Wanted], which: range) -> list[list[list[Text]]]:
        """Answers by what is wanted, factor and instruction; those under directions in one decode call."""
        writer, found = self.writer, dict[int, list[list[Text]]]()
        directed = [i for i, one in enumerate(wanted) if one.arm in ARMS]
        if directed:
            aims = [self.aim(wanted[i].arm, wanted[i].place) for i in directed]
            texts = writer.under_directions(aims, [wanted[i].factors for i in directed], which)
            found |= zip(directed, texts, strict=True)
        if prompted := [i for i, one in enumerate(wanted) if one.arm == PROMPT]:
            # A concept that has a name of its own is asked for by it: the judge's words say what the judge looks for.
            judged = [self.judged[wanted[i].place] for i in prompted]
            words = [one.concept.name if one.concept.feature is None else one.meaning.text for one in judged]
            found |= zip(prompted, writer.prompted(words, which), strict=True)
        for name, arm in self.own.items():
            if mine := [i for i, one in enumerate(wanted) if one.arm == name]:
                names = [self.judged[wanted[i].place].concept.name for i in mine]
                texts = writer.by_own_arm(arm, names, [wanted[i].factors for i in mine], which)
                found |= zip(mine, texts, strict=True)
        return [found[i] for i in range(len(wanted))]


def _kept(one: Text, rating: Rating | Unjudged) -> dict[str, Any]:
    """A text with its scores."""
    return {"text": one.text, "nll": one.nll, "ordinary": one.ordinary, "scores": _scores(rating, one.ordinary)}


def _scores(rating: Rating | Unjudged, ordinary: bool) -> list[float] | str:
    """Concept, instruction, and fluency, which counts where the text is ordinary; or why there are none."""
    if isinstance(rating, Unjudged):
        return rating.reason
    return [*rating._replace(fluency=rating.fluency * ordinary)]


def _numbers(one: dict[str, Any] | None) -> list[float]:
    """Of a text that is kept, or of none."""
    return [np.nan] * 3 if one is None or isinstance(one["scores"], str) else one["scores"]


def _joined(name: str, factors: tuple[float, ...], kept: Sequence[dict[str, Any]], instructions: int) -> ArmUtility:
    rows: list[list[list[dict[str, Any] | None]]] = [
        [[*texts, *[None] * (instructions - len(texts))] for texts in one["arms"][name]] for one in kept
    ]

    def of(read: Callable[[dict[str, Any] | None], Any]) -> list[list[list[Any]]]:
        return [[[read(one) for one in texts] for texts in concept] for concept in rows]

    return ArmUtility(
        arm=name, factors=factors, features=tuple(one["features"].get(name) for one in kept),
        scores=np.array(of(_numbers)), ordinary=np.array(of(lambda one: bool(one and one["ordinary"]))),
        texts=of(lambda one: one and one["text"]),
    )  # fmt: skip
