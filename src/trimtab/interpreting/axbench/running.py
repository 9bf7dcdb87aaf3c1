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
from trimtab.interpreting.axbench.concepts import Concept
from trimtab.interpreting.axbench.result import ArmUtility, AxBench, make_result
from trimtab.interpreting.axbench.writing import OwnArm, Text, Writer
from trimtab.interpreting.instructions import Instructions
from trimtab.interpreting.judge import FeatureJudge, Meaning, Rating, ToRate
from trimtab.judges import Unjudged
from trimtab.lm import DecodingConfig, LanguageModel, PositionRule
from trimtab.runs import Meter, config_dict, read_json, text_id, write_json
from trimtab.steering import Unit
from trimtab.steering.doses import check_unit

PROMPT = "prompt"
ROWS = 4000
"""Answers that are written and kept together at most, unless one concept has more."""


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
    keep: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> AxBench:
    """Steer towards concepts, and let a judge read the answers.

    Each concept's factor is the one of the highest mean score on the instructions to choose on, and its score is the
    mean on the others. A score is the harmonic mean of the judge's three; that of fluency counts 0 where a text is not
    ordinary (see `Text`). What the judge does not judge is counted, and is no 0.

    Args:
        model: the model.
        concepts: what to bring about.
        judge: says what concepts mean, and reads answers for them.
        instructions: to choose on and to report on.
        site: where to steer; the dictionary's by default.
        dictionary: whose features steer.
        own_arms: further arms with models of their own.
        options: everything else.
        keep: directory in which finished answers and ratings are kept, so that the same call goes on there.
        say: told what is to be done before it begins; by default it is printed to stderr.

    Raises:
        UserError: an arm or a site is unknown, an arm needs an SAE or its statistics, or no concept can be judged.
    """
    options = options or AxBenchOptions()
    own = {arm.name: arm for arm in own_arms}
    for name in options.arm:
        if name != PROMPT:
            named({**ARMS, **own, PROMPT: None}, name, "arm")
    arms = (*options.arm, *(name for name in own if name not in options.arm))
    explained = judge.explain([concept.exemplars for concept in concepts])
    judged = [(c, m) for c, m in zip(concepts, explained, strict=True) if not isinstance(m, Unjudged)]
    gaps = {c.name: m.reason for c, m in zip(concepts, explained, strict=True) if isinstance(m, Unjudged)}
    if not judged:
        why = f"the judge explains none ({next(iter(gaps.values()), 'there are none')})"
        raise UserError("the concepts", why, "give more texts or windows (trimtab examples --top 12 --weighted 8)")
    place = model.site(site or (dictionary.info.site if dictionary is not None else ""))
    if dictionary is not None and "features" in arms:
        check_unit(options.unit, has_statistics=dictionary.feature_stats is not None)
    chat = bool(getattr(model.tokenizer, "chat_template", None))
    usual = {PROMPT: (1.0,)} | {name: arm.factors for name, arm in own.items()}
    factors = {name: usual.get(name, options.factor) for name in arms}
    price = _Price(len(judged), factors, len(instructions.all), options.max_new_tokens)
    with Meter("unsteered answers") as meter:
        writer = Writer(
            model, place, instructions, options.decode_config(), chat=chat, positions=options.positions,
            unit=options.unit, progress=lambda n: meter.advance(n),
        )  # fmt: skip
        began = time.perf_counter()
        check = writer.check_fluency(options.seed)
        price.seconds_per_text = (time.perf_counter() - began) / writer.n_own
    (say or _to_stderr)(str(price))
    ground = Ground(
        model=model, site=place, concepts=[c for c, _ in judged], meanings=[m for _, m in judged],
        prompts=writer.prompts[: len(instructions.choosing)], dictionary=dictionary, seed=options.seed,
    )  # fmt: skip
    blocks = price.blocks
    made_from = text_id(
        json.dumps(
            [config_dict(replace(options, batch_size=1)), [c.name for c, _ in judged], instructions.all, str(place),
             judge.name, judge.version, model.fingerprint, "" if dictionary is None else dictionary.fingerprint]
        )
    )  # fmt: skip
    aims: dict[str, list[Aim]] = {}
    if not all(_file(keep, number).is_file() for number in range(len(blocks))) if keep is not None else True:
        aims = {name: ARMS[name](ground) for name in arms if name in ARMS}
    rated: list[dict[str, Any]] = []
    with Meter("steered answers", price.texts) as meter:
        writer.progress = meter.advance
        for number, block in enumerate(blocks):
            kept = None if keep is None else _read(_file(keep, number), made_from)
            if kept is None:
                meanings = [ground.meanings[i] for i in block]
                names = [ground.concepts[i].name for i in block]
                written = _write(writer, arms, aims, factors, block, meanings, names, own)
                kept = {"arms": _rate(judge, writer, written, meanings), "made_from": made_from}
                kept["features"] = {name: [mine[i].feature for i in block] for name, mine in aims.items()}
                if keep is not None:
                    write_json(_file(keep, number), kept)
            rated.append(kept)
    return make_result(
        ground, judge, instructions, options.unit, check, gaps,
        [_joined(name, factors[name], rated) for name in arms],
    )  # fmt: skip


class _Price:
    """What is to be written."""

    def __init__(self, concepts: int, factors: dict[str, tuple[float, ...]], instructions: int, tokens: int) -> None:
        per_concept = instructions * sum(map(len, factors.values()))
        self.texts, self.tokens = concepts * per_concept, concepts * per_concept * tokens
        step = max(1, ROWS // per_concept)
        self.blocks = [range(i, min(i + step, concepts)) for i in range(0, concepts, step)]
        self.seconds_per_text = 0.0

    def __str__(self) -> str:
        minutes = self.texts * self.seconds_per_text / 60
        texts = f"{self.texts:,} answers to write and judge, of {self.tokens:,} tokens at most"
        return f"{texts}; writing takes about {minutes:.0f} minutes"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _file(keep: Path, number: int) -> Path:
    return keep / f"answers-{number:04d}.json"


def _read(path: Path, made_from: str) -> dict[str, Any] | None:
    """Answers that were kept, if there are any. Raises a `UserError` if they were made otherwise."""
    kept = read_json(path)
    if kept is not None and kept.get("made_from") != made_from:
        why = "they were made of other concepts or instructions, or with other options"
        raise UserError(f"answers in {path}", why, "give another directory")
    return kept


def _write(
    writer: Writer, arms: Sequence[str], aims: dict[str, list[Aim]], factors: dict[str, tuple[float, ...]],
    block: Sequence[int], meanings: Sequence[Meaning], names: Sequence[str], own: dict[str, OwnArm],
) -> dict[str, list[list[list[Text]]]]:  # fmt: skip
    """Answers by arm, concept, factor and instruction; those under directions in one decode call."""
    directed = [(name, i) for name in arms if name in aims for i in block]
    texts = (
        writer.under_directions([aims[name][i] for name, i in directed], [factors[name] for name, _ in directed])
        if directed
        else []
    )
    found: dict[str, list[list[list[Text]]]] = {}
    for (name, _), mine in zip(directed, texts, strict=True):
        found.setdefault(name, []).append(mine)
    if PROMPT in arms:
        found[PROMPT] = writer.prompted(meanings)
    for name, arm in own.items():
        found[name] = writer.by_own_arm(arm, names)
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
    """A text with its scores; fluency counts where the text is ordinary."""
    judged = not isinstance(rating, Unjudged)
    scores = [*rating._replace(fluency=rating.fluency * one.ordinary)] if judged else rating.reason
    return {"text": one.text, "nll": one.nll, "ordinary": one.ordinary, "scores": scores}


def _joined(name: str, factors: tuple[float, ...], blocks: Sequence[dict[str, Any]]) -> ArmUtility:
    rows = [concept for block in blocks for concept in block["arms"][name]]
    features = [each for block in blocks for each in block["features"].get(name, [None] * len(block["arms"][name]))]

    def scores(one: dict[str, Any]) -> list[float]:
        return [np.nan] * 3 if isinstance(one["scores"], str) else one["scores"]

    every = np.array([[[scores(one) for one in texts] for texts in concept] for concept in rows])
    return ArmUtility(
        arm=name, factors=factors, features=tuple(features), scores=every,
        ordinary=np.array([[[one["ordinary"] for one in texts] for texts in concept] for concept in rows]),
        texts=[[[one["text"] for one in texts] for texts in concept] for concept in rows],
    )  # fmt: skip
