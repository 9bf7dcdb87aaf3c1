"""Do flags decide what is written? Switched on, off and left free, and beside other ways of control.

A judge that is not the model says which texts are about a concept; only fluent texts count, and intervals are over
prompts. The switchboard and the prompts that ask for a concept are the model's alone. Beside it, on the original model:
a mean difference, the best SAE feature, prompting, the same finetuning without flags, and, as a control, equal values
written into dimensions that are no flag's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.control import Setting
from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.base import check_is_dictionary
from trimtab.errors import UserError
from trimtab.flags.evaluation.control_comparison import Ground, compare_concepts
from trimtab.flags.evaluation.control_fit import fit_controls
from trimtab.flags.evaluation.control_judging import JudgesConcepts, TextReader
from trimtab.flags.evaluation.control_prompts import NEUTRAL, asking_prompts, described, divided
from trimtab.flags.evaluation.control_rates import Counts, difference, fluency, mean_difference, rate
from trimtab.flags.evaluation.control_result import BoardRow, ConceptControl, FlagControl, SampleText
from trimtab.flags.evaluation.control_summary import arm_rates, frontier_points
from trimtab.flags.evaluation.control_texts import (
    ASKED,
    CONFLICT,
    FREE,
    OFF,
    ON,
    Texts,
    conditions_of,
    write_texts,
)
from trimtab.flags.evaluation.control_texts import NEUTRAL as ON_NEUTRAL
from trimtab.flags.examples import Example, check_learnable
from trimtab.flags.spec import FlagSpec
from trimtab.lm import DecodeConfig, LanguageModel, PromptCache, Site
from trimtab.lm.model import check_is_model
from trimtab.runs import Meter, check_least, check_values, field_types, read_keywords
from trimtab.stats import Interval

SHOWN_PROMPTS = 2
"""Prompts of each concept whose texts are shown."""
FIT_STREAM = 12
"""Of the draw of examples that are fitted on."""


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """How control is measured.

    Raises:
        UserError: a value is out of range.
    """

    samples: int = 2
    """Texts of each prompt under each switch; ways of control write one."""
    max_new_tokens: int = 32
    """Tokens of a text."""
    temperature: float = 0.7
    """Of the tokens."""
    chat: bool = False
    """Whether prompts are turns in the model's chat template, as in the finetuning."""
    validation_prompts: int = 8
    """Neutral prompts that choose doses, features and instructions, and are not reported on."""
    compared: int | None = None
    """Compare other ways of control for the first so many concepts; for all by default."""
    site: tuple[str, ...] = ()
    """Where mean differences are tried; after a third, a half and two thirds of the layers by default."""
    dose: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """‖Δ‖/‖x‖ that are tried for mean differences."""
    strength: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 1.5)
    """Of the frontier: times on, or times the dose that was chosen."""
    features: int = 8
    """SAE features to try, those that go most with the label."""
    equal_kl: bool = True
    """Scale mean difference and SAE feature to the divergence of the flags, too."""
    fit_items: int = 256
    """Examples on which mean differences and features are fitted, at most."""
    max_tokens: int = 256
    """Tokens of an example; longer responses are cut."""
    batch_size: int = 64
    """Rows decoded together."""
    seed: int = 0
    """Of the tokens, the control's dimensions and the bootstrap."""

    def __post_init__(self) -> None:
        check_least(self, 1, "samples", "max_new_tokens", "validation_prompts", "features", "batch_size", "compared")
        check_least(self, 2, "max_tokens", "fit_items")
        check_values(self, "0, or from 1e-6 to 1e6", lambda value: value == 0 or 1e-6 <= value < 1e6, "temperature")
        if self.samples > 1 and self.temperature == 0:
            why = "greedy decoding gives the same text every time"
            raise UserError(f"samples {self.samples}", why, "set a temperature, or take one sample")
        for name, least in (("dose", 0.0), ("strength", -1e-9)):
            values = getattr(self, name)
            if not values or any(not least < value < 1000 for value in values):
                raise UserError(f"{name} {values}", "numbers above 0 and below 1000 are needed", "change them")


def measure_control(
    model: LanguageModel,
    flags: FlagSpec,
    judge: JudgesConcepts,
    *,
    original: LanguageModel | None = None,
    examples: Sequence[Example] = (),
    plain: LanguageModel | None = None,
    dictionary: Dictionary | None = None,
    heldout: Sequence[Example] = (),
    neutral: Sequence[str] = NEUTRAL,
    asking: Mapping[str, Sequence[str]] | None = None,
    descriptions: Mapping[str, str] | None = None,
    **options: Any,
) -> FlagControl:
    """Measure how far flags decide what a model writes, and what else would.

    Args:
        model: with flags.
        flags: its flags.
        judge: finds concepts in texts: a `ConceptJudge`, or any object with `concepts` and `has(texts) -> [N, C]`.
        original: the model before it was finetuned. Divergences are from it, and other ways of control act on it;
            without it there is the switchboard alone.
        examples: labelled, on which mean differences and SAE features are fitted: those that flags were trained on.
        plain: the original finetuned on the same examples without flags.
        dictionary: an SAE of the original.
        heldout: labelled responses that the judge has not seen, for its accuracy; by default what it says of itself.
        neutral: prompts that ask for nothing in particular; the first `validation_prompts` are not reported on.
        asking: prompts that ask for each concept; a few templates with its description by default.
        descriptions: what each concept is in words, as `read_concepts` gives them.
        options: fields of `ControlOptions`.

    Returns:
        Rates with intervals over prompts, the switchboard, ways of control, the frontier of rate and divergence, texts.

    Raises:
        UserError: a value is not allowed, flags do not fit the model, the judge does not know a concept, models differ
            in their vocabulary, or examples are too few for a concept.
    """
    check_is_model(model)
    flags.check_fits(model.layout, model.d_model, model.name)
    config = ControlOptions(**read_keywords(options, field_types(ControlOptions), measure_control))
    reader = TextReader(judge, flags.concepts)
    validation, test = divided(neutral, config.validation_prompts)
    asking = _checked(asking or asking_prompts(flags.concepts, descriptions), flags)
    for other in (original, plain):
        _check_alike(model, other)
    for example in [*examples, *heldout]:
        flags.labels([example.concepts])
    ground = None
    if original is not None:
        check_learnable(examples, flags.concepts)
        words = described(flags.concepts, descriptions)
        ground = _ground(
            model, flags, original, examples, plain, dictionary, reader, words, validation, test, asking, config
        )  # fmt: skip
    conditions = conditions_of(flags.concepts, test, asking)
    decoding = DecodeConfig(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    with Meter("writing under switches", config.samples * sum(len(one.prompts) for one in conditions)) as meter:
        texts = write_texts(
            model, flags, conditions, reader, decoding, samples=config.samples, chat=config.chat, progress=meter.advance
        )
    compared = {} if ground is None else compare_concepts(ground, flags.concepts[: config.compared])
    board = _Board(flags, texts, config.seed)
    return FlagControl(
        concepts=tuple(board.concept(i) for i in range(len(flags.concepts))),
        difference=board.difference(),
        board=tuple(board.rows()),
        arms=tuple(arm_rates(compared, config.seed)) if compared else (),
        frontier=tuple(frontier_points(compared, config.seed)) if compared else (),
        judge=reader.accuracy(heldout, config.seed),
        texts=tuple(board.samples(test)),
        prompts=len(test),
        validation_prompts=len(validation),
        samples=config.samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        missing=_missing(original, plain, dictionary)
        | {f"{name}, {concept}": why for concept, one in compared.items() for name, why in one.missing.items()},
    )


class _Board:
    """Rates of texts under switches."""

    def __init__(self, flags: FlagSpec, texts: Texts, seed: int) -> None:
        self.names, self.texts, self.seed = flags.concepts, texts, seed

    def counts(self, kind: str, switched: str, state: str, concept: int) -> Counts:
        """Of a concept under a condition."""
        found = self.texts[kind, switched, state]
        return Counts.of(found.has[:, :, concept], found.fluent)

    def pair(self, i: int) -> tuple[Counts, Counts]:
        """Of a concept on neutral prompts, its flag on and off."""
        on, off = (self.counts(ON_NEUTRAL, self.names[i], state, i) for state in (ON, OFF))
        return on, off

    def difference(self) -> Interval | None:
        """On minus off, mean over concepts."""
        return mean_difference([self.pair(i) for i in range(len(self.names))], self.seed)

    def concept(self, i: int) -> ConceptControl:
        """What one flag does."""
        name, seed = self.names[i], self.seed
        (on, off), free = self.pair(i), self.counts(ON_NEUTRAL, "", FREE, i)
        asked_free, asked_off = (self.counts(ASKED, name, state, i) for state in (FREE, OFF))
        other = (i + 1) % len(self.names)
        conflict = (CONFLICT, name, OFF) if other != i else None
        fluent = {state: self.fluent(ON_NEUTRAL, "" if state == FREE else name, state) for state in (ON, OFF, FREE)}
        return ConceptControl(
            concept=name,
            on=rate(on, seed),
            off=rate(off, seed),
            free=rate(free, seed),
            difference=difference(on, off, seed),
            asked_free=rate(asked_free, seed),
            asked_off=rate(asked_off, seed),
            suppressed=difference(asked_free, asked_off, seed),
            other=self.names[other] if conflict else "",
            conflict_asked=rate(self.counts(*conflict, i), seed) if conflict else None,
            conflict_other=rate(self.counts(*conflict, other), seed) if conflict else None,
            fluent_on=fluent[ON],
            fluent_off=fluent[OFF],
            fluent_free=fluent[FREE],
        )

    def fluent(self, kind: str, switched: str, state: str) -> Interval:
        """Share of fluent texts under a condition."""
        found = self.texts[kind, switched, state].fluent
        return fluency(found.sum(axis=1).astype(float), found.shape[1], self.seed)

    def rows(self) -> list[BoardRow]:
        """Every concept's rate under every switch."""
        keys = [("", FREE), *((name, state) for name in self.names for state in (ON, OFF))]
        return [
            BoardRow(
                switch=f"{name} {state}" if name else "all free",
                rates=tuple(rate(self.counts(ON_NEUTRAL, name, state, i), self.seed) for i in range(len(self.names))),
                fluent=self.fluent(ON_NEUTRAL, name, state),
            )
            for name, state in keys
        ]

    def samples(self, prompts: Sequence[str]) -> list[SampleText]:
        """First texts of the first prompts, by concept."""
        free = self.texts[ON_NEUTRAL, "", FREE].texts
        found: list[SampleText] = []
        for name in self.names:
            on, off = (self.texts[ON_NEUTRAL, name, state].texts for state in (ON, OFF))
            for p, prompt in enumerate(prompts[:SHOWN_PROMPTS]):
                found.append(SampleText(concept=name, prompt=prompt, free=free[p][0], on=on[p][0], off=off[p][0]))
        return found


def _ground(
    model: LanguageModel,
    flags: FlagSpec,
    original: LanguageModel,
    examples: Sequence[Example],
    plain: LanguageModel | None,
    dictionary: Dictionary | None,
    reader: TextReader,
    words: Mapping[str, str],
    validation: Sequence[str],
    test: Sequence[str],
    asking: Mapping[str, Sequence[str]],
    config: ControlOptions,
) -> Ground:
    """What other ways of control need, once it is known to fit; directions and features are fitted."""
    if dictionary is not None:
        check_is_dictionary(dictionary)
        if not dictionary.info.site:
            raise UserError("the SAE", "it does not name the site that it reads", "give one that does")
    depth = original.n_layers
    usual = dict.fromkeys(f"resid_post.{depth * share // 6}" for share in (2, 3, 4))
    sites: list[Site] = [original.site(name) for name in (config.site or usual)]
    at = sites[0] if dictionary is None else original.site(dictionary.info.site)
    setting = Setting(
        model=original,
        dictionary=dictionary,
        site=at,
        seed=config.seed,
        temperature=config.temperature,
        batch_size=config.batch_size,
        prompt_cache=PromptCache(original),
    )
    order = np.random.default_rng([config.seed, FIT_STREAM]).permutation(len(examples))
    fitted_on = [examples[i] for i in order[: config.fit_items]]
    check_learnable(fitted_on, flags.concepts)
    with Meter("fitting directions", len(fitted_on)) as meter:
        fitted = fit_controls(
            original, flags, fitted_on, sites, dictionary, features=config.features, chat=config.chat,
            max_tokens=config.max_tokens, progress=meter.advance,
        )  # fmt: skip
    return Ground(
        model=model, flags=flags, setting=setting, fitted=fitted, plain=plain, reader=reader, words=words,
        validation=validation, test=test, asking=asking, doses=config.dose, strengths=config.strength,
        features=config.features, chat=config.chat, max_new_tokens=config.max_new_tokens, equal_kl=config.equal_kl,
    )  # fmt: skip


def _checked(asking: Mapping[str, Sequence[str]], flags: FlagSpec) -> Mapping[str, Sequence[str]]:
    """Prompts for each concept and none else."""
    for concept in asking:
        flags.index(concept)
    for concept in flags.concepts:
        prompts = asking.get(concept, ())
        if isinstance(prompts, str) or not prompts:
            raise UserError(
                f"prompts that ask for {concept!r}", "there is none", "give a list of texts for each concept"
            )
    return asking


def _check_alike(model: LanguageModel, other: LanguageModel | None) -> None:
    if other is not None and other.vocab_size != model.vocab_size:
        why = f"{model.name} has {model.vocab_size} tokens, {other.name} {other.vocab_size}"
        raise UserError("models of one evaluation", why, "give the model that was finetuned")


def _missing(
    original: LanguageModel | None, plain: LanguageModel | None, dictionary: Dictionary | None
) -> dict[str, str]:
    if original is None:
        return {"other ways of control": "not asked for (--compared, or original in Python)"}
    found: dict[str, str] = {}
    if dictionary is None:
        found["SAE feature"] = "no SAE was given"
    if plain is None:
        found["finetuned without flags"] = "no such model was given"
    return found
