"""Do flags decide what is written? Switched on, off and left free, and beside other ways of control.

A judge that is not the model says which texts are about a concept; only fluent texts count, and intervals are over
prompts. The switchboard and the prompts that ask for a concept are the model's alone. Beside it, on the original model:
a mean difference, the best SAE feature, prompting and the same finetuning without flags; and, as a control, the model
with flags, with dimensions that are no flag's set as flags are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.control import Setting
from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.base import check_is_dictionary
from trimtab.errors import UserError
from trimtab.flags.evaluation.control_comparison import SAE_FEATURE, ComparedConcept, Comparing
from trimtab.flags.evaluation.control_fit import Fitted, fit_controls
from trimtab.flags.evaluation.control_judging import JudgesConcepts, TextReader, check_unseen
from trimtab.flags.evaluation.control_prompts import asking_prompts, described, divided, neutral_prompts
from trimtab.flags.evaluation.control_result import FlagControl
from trimtab.flags.evaluation.control_summary import Board, arm_rates
from trimtab.flags.evaluation.control_texts import NEUTRAL, Writer, conditions_of
from trimtab.flags.evaluation.options import ControlOptions
from trimtab.flags.evaluation.unassigned import VARIANCE_ITEMS, unassigned_draws
from trimtab.flags.examples import Example, check_learnable, encode
from trimtab.flags.placing import measure_residuals
from trimtab.flags.spec import FlagSpec
from trimtab.lm import DecodeConfig, LanguageModel, PromptCache, Site
from trimtab.lm.model import check_is_model
from trimtab.runs import Meter, field_types, read_keywords

FIT_STREAM = 12
"""Of the draw of examples that are fitted on."""
OTHER_WAYS = "other ways of control"


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
    neutral: Sequence[str] | None = None,
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
        examples: labelled, that flags were trained on; mean differences and SAE features are fitted on them, too.
        plain: the original finetuned on the same examples without flags.
        dictionary: an SAE of the original.
        heldout: labelled responses that the judge has not seen, for its accuracy; by default what it says of itself.
        neutral: prompts that ask for nothing in particular; the first `validation_prompts` are not reported on. By
            default a list without prompts that name a concept, or that stand in `examples`.
        asking: prompts that ask for each concept; a few templates with its description by default.
        descriptions: what each concept is in words, as `read_concepts` gives them.
        options: fields of `ControlOptions`.

    Returns:
        Rates with intervals over prompts, the switchboard, ways of control, the frontier of rate and divergence, texts.

    Raises:
        UserError: a value is not allowed, flags do not fit the model, the judge does not know a concept, models differ
            in their vocabulary, the judge was fitted on texts of the examples, or these are too few for a concept.
    """
    check_is_model(model)
    flags.check_fits(model.layout, model.d_model, model.name)
    config = ControlOptions(**read_keywords(options, field_types(ControlOptions), measure_control))
    reader = TextReader(judge, flags.concepts)
    words = described(flags.concepts, descriptions)
    prompts = neutral_prompts(words, examples) if neutral is None else neutral
    validation, test = divided(prompts, config.validation_prompts, config.prompts)
    asking = _checked(asking or asking_prompts(words), flags)
    for other in (original, plain):
        if other is not None and other.vocab_size != model.vocab_size:
            why = f"{model.name} has {model.vocab_size} tokens, {other.name} {other.vocab_size}"
            raise UserError("models of one evaluation", why, "give the model that was finetuned")
    flags.labels([example.concepts for example in [*examples, *heldout]])
    check_unseen(judge, [*examples, *heldout], "the model")
    quality = reader.quality(heldout, config.seed)
    missing = _missing(original, examples, plain, dictionary, config)
    wanted = () if OTHER_WAYS in missing else flags.concepts[: config.compared]
    every = dict.fromkeys([*test, *(prompt for some in asking.values() for prompt in some)])
    writer = Writer(
        reader=reader, samples=config.samples, chat=config.chat, keys={prompt: i for i, prompt in enumerate(every)},
        decoding=DecodeConfig(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=config.seed,
            batch_size=config.batch_size,
        ),
    )  # fmt: skip
    prepared = None
    if original is not None and wanted:
        prepared = _prepared(original, flags, examples, dictionary, config)
        writer = writer._replace(cache=prepared[0].prompt_cache)
    conditions = conditions_of(flags.concepts, test, asking)
    near = [one for one in conditions if wanted and one.kind == NEUTRAL and one.concept in ("", *wanted)]
    with Meter("writing under switches", config.samples * sum(len(one.prompts) for one in conditions)) as meter:
        board = writer._replace(progress=meter.advance)
        texts = board.write(model, flags, [one for one in conditions if one not in near])
        texts |= board.write(model, flags, near, kl_to=original)
    compared: dict[str, ComparedConcept] = {}
    if prepared is not None:
        setting, fitted, elsewhere = prepared
        compared = Comparing(
            model=model, flags=flags, plain=plain, elsewhere=elsewhere, setting=setting, fitted=fitted, writer=writer,
            board=texts, words=words, validation=validation, test=test, asking=asking, options=config,
        ).compare(wanted)  # fmt: skip
    rates = Board(flags.concepts, texts, config.seed)
    return FlagControl(
        concepts=tuple(rates.concept(i) for i in range(len(flags.concepts))),
        difference=rates.difference(),
        board=tuple(rates.rows()),
        arms=tuple(arm_rates(compared, config.seed)) if compared else (),
        judge=quality,
        texts=tuple(rates.samples(test)),
        prompts=len(test),
        validation_prompts=len(validation),
        samples=config.samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        missing=missing
        | {f"{name}, {concept}": why for concept, one in compared.items() for name, why in one.missing.items()},
    )


def _prepared(
    original: LanguageModel,
    flags: FlagSpec,
    examples: Sequence[Example],
    dictionary: Dictionary | None,
    config: ControlOptions,
) -> tuple[Setting, Fitted, list[FlagSpec]]:
    """What other ways of control need, once it is known to fit: directions and features, fitted, and dimensions that
    are no flag's."""
    check_learnable(examples, flags.concepts)
    if dictionary is not None:
        check_is_dictionary(dictionary)
        if not dictionary.info.site:
            raise UserError("the SAE", "it does not name the site that it reads", "give one that does")
    depth = original.n_layers
    sites = [Site("resid_post", layer) for layer in dict.fromkeys(depth * share // 6 for share in (2, 3, 4))]
    setting = Setting(
        model=original, dictionary=dictionary, seed=config.seed, temperature=config.temperature,
        site=None if dictionary is None else original.site(dictionary.info.site), batch_size=config.batch_size,
        prompt_cache=PromptCache(original),
    )  # fmt: skip
    order = np.random.default_rng([config.seed, FIT_STREAM]).permutation(len(examples))
    fitted_on = [examples[i] for i in order[: config.fit_items]]
    check_learnable(fitted_on, flags.concepts)
    tokens = encode(original, fitted_on[:VARIANCE_ITEMS], chat=config.chat, max_tokens=config.max_tokens)
    variance = measure_residuals(original, [one.ids for one in tokens], flags.sites).relative_variance.numpy()
    elsewhere = unassigned_draws(flags, variance, config.seed)
    with Meter("fitting directions", len(fitted_on)) as meter:
        fitted = fit_controls(
            original, flags, fitted_on, sites, dictionary, features=config.features, chat=config.chat,
            max_tokens=config.max_tokens, progress=meter.advance,
        )  # fmt: skip
    return setting, fitted, elsewhere


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


def _missing(
    original: LanguageModel | None,
    examples: Sequence[Example],
    plain: LanguageModel | None,
    dictionary: Dictionary | None,
    config: ControlOptions,
) -> dict[str, str]:
    """What is not compared, and why."""
    lacking = {
        "the original model was not given": original is None,
        "compared is 0": not config.compared,
        "the examples that flags were trained on were not given": not examples,
    }
    for why in (why for why, holds in lacking.items() if holds):
        return {OTHER_WAYS: why}
    found = {} if dictionary is not None else {SAE_FEATURE: "no SAE was given"}
    said = "no plain finetuning with the same settings and seed was given"
    return found | ({} if plain is not None else {"finetuned without flags": said})
