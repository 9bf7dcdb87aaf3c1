"""Steer towards concepts by several arms, let a judge read what was written, and keep what is done."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError, named
from trimtab.interpreting.axbench.arms import ARMS, Aim, Ground
from trimtab.interpreting.axbench.concepts import Concept, are_fitted, share_out
from trimtab.interpreting.axbench.result import ArmUtility, AxBench, make_result
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
    mean on the others. A score is the harmonic mean of the judge's three; that of fluency counts 0 where a text is not
    ordinary (see `Text`). What the judge does not judge is counted, and is no 0. Where an arm is fitted on exemplars,
    it is given every second one of each concept, and the judge the others.

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
    price = _Price(len(missing), factors, len(instructions.all), options.max_new_tokens)
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
    aims = {name: ARMS[name](ground) for name in arms if name in ARMS} if missing else {}
    _ask_again(judge, writer, [one for one in judged if one.kept is not None])
    with Meter("steered answers", price.texts) as meter:
        writer.progress = meter.advance
        for block in price.blocks:
            places = [missing[i] for i in block]
            some = [judged[i] for i in places]
            written = _write(writer, arms, aims, factors, places, some, own)
            rated = _rate(judge, writer, written, [one.meaning for one in some])
            for i, (at, one) in enumerate(zip(places, some, strict=True)):
                one.kept = {
                    "made_from": made_from, "meaning": one.meaning.text,
                    "arms": {name: by_concept[i] for name, by_concept in rated.items()},
                    "features": {name: mine[at].feature for name, mine in aims.items()},
                }  # fmt: skip
                one.write()
    rows = [one.kept for one in judged if one.kept is not None]
    found = make_result(
        ground, judge, instructions, options.unit, check, gaps, [_joined(name, factors[name], rows) for name in arms],
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


class _Price:
    """What is to be written."""

    def __init__(self, concepts: int, factors: dict[str, tuple[float, ...]], instructions: int, tokens: int) -> None:
        per_concept = instructions * sum(map(len, factors.values()))
        self.texts, self.tokens = concepts * per_concept, concepts * per_concept * tokens
        step = max(1, ROWS // per_concept)
        self.blocks = [range(i, min(i + step, concepts)) for i in range(0, concepts, step)]
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
        for text, instruction, unsteered in zip(texts, writer.instructions, writer.unsteered, strict=True)
        if isinstance(text["scores"], str)
    ]
    if not gaps:
        return
    for (_, text, _), rating in zip(gaps, judge.rate([asked for *_, asked in gaps]), strict=True):
        text["scores"] = _scores(rating, text["ordinary"])
    for one in dict.fromkeys(one for one, *_ in gaps):
        one.write()


def _write(
    writer: Writer, arms: Sequence[str], aims: dict[str, list[Aim]], factors: dict[str, tuple[float, ...]],
    places: Sequence[int], judged: Sequence[_Judged], own: dict[str, OwnArm],
) -> dict[str, list[list[list[Text]]]]:  # fmt: skip
    """Answers by arm, concept, factor and instruction; those under directions in one decode call."""
    directed = [(name, i) for name in arms if name in aims for i in places]
    texts = (
        writer.under_directions([aims[name][i] for name, i in directed], [factors[name] for name, _ in directed])
        if directed
        else []
    )
    found: dict[str, list[list[list[Text]]]] = {}
    for (name, _), mine in zip(directed, texts, strict=True):
        found.setdefault(name, []).append(mine)
    if PROMPT in arms:
        # A concept that has a name of its own is asked for by it: the judge's words say what the judge looks for.
        found[PROMPT] = writer.prompted(
            [one.concept.name if one.concept.feature is None else one.meaning.text for one in judged]
        )
    for name, arm in own.items():
        found[name] = writer.by_own_arm(arm, [one.concept.name for one in judged])
    return found


def _rate(
    judge: FeatureJudge, writer: Writer, written: dict[str, list[list[list[Text]]]], meanings: Sequence[Meaning]
) -> dict[str, Any]:
    """Ratings beside texts, in the same order."""
    asked = [
        ToRate(meaning=meaning, instruction=instruction, text=one.text, unsteered=unsteered)
        for by_concept in written.values()
        for meaning, by_factor in zip(meanings, by_concept, strict=True)
        for texts in by_factor
        for one, instruction, unsteered in zip(texts, writer.instructions, writer.unsteered, strict=True)
    ]
    ratings = iter(judge.rate(asked))
    return {
        name: [[[_kept(one, next(ratings)) for one in texts] for texts in by_factor] for by_factor in by_concept]
        for name, by_concept in written.items()
    }


def _kept(one: Text, rating: Rating | Unjudged) -> dict[str, Any]:
    """A text with its scores."""
    return {"text": one.text, "nll": one.nll, "ordinary": one.ordinary, "scores": _scores(rating, one.ordinary)}


def _scores(rating: Rating | Unjudged, ordinary: bool) -> list[float] | str:
    """Concept, instruction, and fluency, which counts where the text is ordinary; or why there are none."""
    if isinstance(rating, Unjudged):
        return rating.reason
    return [*rating._replace(fluency=rating.fluency * ordinary)]


def _joined(name: str, factors: tuple[float, ...], kept: Sequence[dict[str, Any]]) -> ArmUtility:
    rows = [one["arms"][name] for one in kept]

    def scores(one: dict[str, Any]) -> list[float]:
        return [np.nan] * 3 if isinstance(one["scores"], str) else one["scores"]

    every = np.array([[[scores(one) for one in texts] for texts in concept] for concept in rows])
    return ArmUtility(
        arm=name, factors=factors, features=tuple(one["features"].get(name) for one in kept), scores=every,
        ordinary=np.array([[[one["ordinary"] for one in texts] for texts in concept] for concept in rows]),
        texts=[[[one["text"] for one in texts] for texts in concept] for concept in rows],
    )  # fmt: skip
