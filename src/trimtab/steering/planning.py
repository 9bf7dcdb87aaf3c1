"""What is to be steered, with what: everything that can be wrong is found before anything is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.meanings import describe_features
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, InterventionSource, LanguageModel, Site, site_width
from trimtab.lm.row import check_prompts
from trimtab.runs import LEFT_OUT_AT_DEFAULT, check_least, known_arguments, plain, whole_numbers
from trimtab.steering.composed_sources import CombinedSource, SomeRowsSource
from trimtab.steering.direction_table import DirectionTable, as_vector
from trimtab.steering.doses import DEFAULT_DOSE, DEFAULT_UNIT, check_doses
from trimtab.steering.operations import operation_named
from trimtab.steering.random_arms import Pool, pool_of, saes_of
from trimtab.steering.saved_steering import Steering
from trimtab.steering.scored import Score
from trimtab.steering.sources import PerSite, StaticSource, by_site, check_heads, head_shapes, vector_table

UNSTEERED = "unsteered"
Directions = PerSite[Dictionary | DirectionTable | Tensor] | InterventionSource | Steering | Sequence[Steering]
"""What may steer: see `steer`."""


@known_arguments
@dataclass(frozen=True, kw_only=True)
class SteerOptions:
    """With which features, how strongly and where, and what is measured."""

    feature: tuple[int, ...] = ()
    """Features to steer with, all at once."""
    dose: tuple[float, ...] = ()
    """How strongly: one number, or one per feature; 0.4 by default."""
    sweep: tuple[float, ...] = ()
    """Doses to try one after the other, each for all features; instead of the dose."""
    unit: str = DEFAULT_UNIT
    """relative (to the activation's norm), max_activation (of the feature) or absolute (model units)."""
    operation: str = "add"
    """add the dose; clamp the feature to it; ablate the feature; scale it by the dose; overwrite the coordinate along
    the feature's direction with the dose."""
    combine: str = "each"
    """With several features: each gets its dose, or together their total length is the dose."""
    site: str | None = None
    """Where to steer; by default the site that the SAE names."""
    positions: str = "generated"
    """Input positions to edit: generated (those that choose a token), prompt, all, START:STOP, or a list like 3,-1."""
    chat: bool = False
    """Put each prompt into the model's chat template, as one user turn."""
    samples: int = 1
    """Continuations per prompt; more than one needs a temperature."""
    kl: bool = True
    """Measure each edit's effect on the next-token distribution; takes one more pass over the texts."""
    controls: bool = field(default=False, metadata=LEFT_OUT_AT_DEFAULT)
    """Put random features at equal dose beside each arm, and say which texts are still ordinary by their likelihood and
    their repetition, and at which dose of a sweep they no longer are."""


class PlannedRow(NamedTuple):
    """One row to decode."""

    prompt: int
    sample: int  # of the prompt
    key: int  # of its random draws, shared by all arms
    arm: int


class PlannedArm(NamedTuple):
    """One way to steer all prompts."""

    name: str
    dose: list[float] | None = None  # of all features or each one's own; None where it is not for the plan to say
    control_of: str = ""  # the arm that it follows at random


class SteeringPlan(NamedTuple):
    """Checked options, with the model and directions."""

    options: SteerOptions
    texts: list[str]
    ids: list[list[int]]
    arms: list[PlannedArm]  # unsteered first
    rows: list[PlannedRow]
    source: InterventionSource
    steered_with: str
    positions: str
    decoding: DecodeConfig
    pool: Pool
    """What controls are drawn from; empty without controls."""
    under_test: tuple[int, ...]
    """Features that no control may be."""
    words: list[str]
    """What is said of each feature beside its number."""
    score: Score | None = None
    """What a wish makes of the arms."""


def plan_steering(
    config: SteerOptions,
    model: LanguageModel,
    directions: Directions,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    decoding: DecodeConfig,
    *,
    keep_length: bool = False,
    any_model: bool = False,
) -> SteeringPlan:
    """Everything that can be wrong is found here, before anything is written.

    Raises:
        UserError: as `steer`.
    """
    check_options(config, len(prompts), decoding)
    saved = _saved(directions)
    if decides(directions):
        tables, steered = {}, [PlannedArm("steered")]
    elif saved:
        tables, steered = {}, _multiples(config)
    else:
        tables = _tables(config, model, directions, keep_length)  # type: ignore[arg-type]
        steered = _steered_arms(config, 1.0 if keep_length else DEFAULT_DOSE)
    ids = [model.encode_text(p, chat=config.chat) if isinstance(p, str) else _tokens(p) for p in prompts]
    check_prompts(model, ids, decoding)
    arms = [PlannedArm(UNSTEERED), *steered]
    rows = [
        PlannedRow(prompt, sample, prompt * config.samples + sample, arm)
        for prompt in range(len(ids))
        for sample in range(config.samples)
        for arm in range(len(arms))
    ]
    if decides(directions):
        source, what = _alone(config, directions, rows)  # type: ignore[arg-type]
    elif saved:
        source, what = _of_saved(config, model, saved, arms, rows, any_model)
    else:
        source, what = _of_tables(config, tables, arms, rows)
    pool: Pool = {}
    if config.controls:
        steers = saes_of(saved) if saved else tables or dict.fromkeys(source.sites)
        pool = pool_of(steers, model, len(ids) * config.samples, decoding.seed)
    return SteeringPlan(
        options=config,
        texts=[p if isinstance(p, str) else model.decode_ids(p, special=True) for p in prompts],
        ids=ids,
        arms=arms,
        rows=rows,
        source=source,
        steered_with=what,
        positions=config.positions if tables else str(source.positions),
        decoding=decoding,
        pool=pool,
        under_test=(*config.feature, *(number for one in saved for part in one.parts for number in part.feature)),
        words=_words_of_saved(saved) if saved else _words(model, tables, config.feature),
    )


def _words(model: LanguageModel, tables: Mapping[Site, object], features: Sequence[int]) -> list[str]:
    """A line for each feature, with its site where there are several."""
    said = [
        (f"{site}:" * (len(tables) > 1) + str(one.feature), str(one))
        for site, table in tables.items()
        if isinstance(table, Dictionary)
        for one in describe_features(model, table, features)
    ]
    return [f"{name}: {words}" for name, words in said if words]


def _words_of_saved(saved: Sequence[Steering]) -> list[str]:
    """The lines that were saved with steerings."""
    parts = [part for one in saved for part in one.parts if part.words]
    return [f"{part.site}:{i}: {words}" for part in parts for i, words in zip(part.feature, part.words, strict=True)]


def decides(directions: object) -> bool:
    """Whether it is a source, which decides everything itself."""
    return hasattr(directions, "sites")


def _saved(directions: object) -> list[Steering]:
    """Saved steerings, if it is one or several; else none."""
    several = directions if isinstance(directions, list | tuple) else [directions]
    found = [one for one in several if isinstance(one, Steering)]
    return found if len(found) == len(several) else []


def _tables(
    config: SteerOptions, model: LanguageModel, directions: PerSite[Dictionary | DirectionTable | Tensor], keep: bool
) -> dict[Site, Dictionary | DirectionTable]:
    """The directions at each site, once they fit it."""
    found: dict[Site, Dictionary | DirectionTable] = {}
    for site, given in by_site(directions, config.site).items():
        width = site_width(model, model.site(site))
        if isinstance(given, Dictionary):
            if not config.feature:
                raise no_features()
            given.check_model(width, model.name, config.site)
            given.check_features(list(config.feature))
        elif not isinstance(given, DirectionTable):
            given = as_vector(given)
            if given.shape[-1:] != (width,):
                check_heads(model, head_shapes({site: given}))
            given = vector_table(given, site, width=width, keep_length=keep)
        found[site] = given
    return found


def _of_tables(
    config: SteerOptions,
    tables: Mapping[Site, Dictionary | DirectionTable],
    arms: Sequence[PlannedArm],
    rows: Sequence[PlannedRow],
) -> tuple[InterventionSource, str]:
    """Features or vectors at each row's doses, and what to call them."""
    still = [0.0] * max(len(arm.dose or ()) for arm in arms)
    ids = {  # every dictionary has been asked for some of its features
        site: list(config.feature or range(table.n if isinstance(table, DirectionTable) else 0))
        for site, table in tables.items()
    }
    source = StaticSource(
        tables,
        {site: torch.tensor([each if row.arm else [-1] * len(each) for row in rows]) for site, each in ids.items()},
        torch.tensor([arms[row.arm].dose or still for row in rows]),
        unit=config.unit,
        operation=config.operation,
        positions=config.positions,
        combine=config.combine,
    )
    if config.feature:
        said = next((table for table in tables.values() if isinstance(table, Dictionary)), None)
        return source, f"feature {', '.join(map(str if said is None else said.label, config.feature))}"
    count = sum(map(len, ids.values()))
    return source, "a vector" if count == 1 else f"{count} vectors"


_OF_ANY_SOURCE = ("chat", "samples", "kl", "controls")


def _alone(
    config: SteerOptions, source: InterventionSource, rows: Sequence[PlannedRow]
) -> tuple[InterventionSource, str]:
    """A source that decides everything itself, in the steered rows."""
    name = getattr(source, "label", type(source).__name__)
    _check_left_out(config, _OF_ANY_SOURCE, name, "the source decides that itself")
    return SomeRowsSource(source, [row.arm == 1 for row in rows]), name


def _of_saved(
    config: SteerOptions,
    model: LanguageModel,
    saved: Sequence[Steering],
    arms: Sequence[PlannedArm],
    rows: Sequence[PlannedRow],
    any_model: bool,
) -> tuple[InterventionSource, str]:
    """Saved steerings, all at once, at each row's multiple of their doses."""
    what = " and ".join(one.label for one in saved)
    _check_left_out(config, (*_OF_ANY_SOURCE, "dose", "sweep"), f"steering {what}", "it says that itself")
    times = [(arms[row.arm].dose or [0.0])[0] if row.arm else None for row in rows]
    sources = [one.source(model, any_model=any_model, times=times) for one in saved]
    return sources[0] if len(sources) == 1 else CombinedSource(sources), what


def _multiples(config: SteerOptions) -> list[PlannedArm]:
    """The arms of a saved steering: doses are multiples of its own."""
    if len(config.dose) > 1:
        why = "a saved steering's doses are multiplied by one number"
        raise UserError(f"{len(config.dose)} doses", why, "give one, or several to --sweep")
    times = config.sweep or config.dose
    return [PlannedArm(f"{number:g} × its dose", [float(number)]) for number in times] or [PlannedArm("steered", [1.0])]


def _check_left_out(config: SteerOptions, allowed: Sequence[str], name: str, why: str) -> None:
    """Refuse options that say what is said already."""
    usual = SteerOptions()
    for one in fields(config):
        if one.name not in allowed and getattr(config, one.name) != getattr(usual, one.name):
            raise UserError(f"{one.name} beside {name}", why, "leave it out")


def _tokens(prompt: Sequence[int]) -> list[int]:
    """The token ids of a prompt."""
    if not isinstance(plain(prompt), list):
        raise UserError(f"prompt {prompt!r}", "it is neither a text nor token ids", "give texts, or lists of token ids")
    return whole_numbers(prompt, "token")


def _steered_arms(config: SteerOptions, usual: float) -> list[PlannedArm]:
    """Per steered arm its name and the dose of all features or each one's own."""
    if not operation_named(config.operation).has_dose:
        return [PlannedArm(config.operation.removesuffix("e") + "ed", [0.0])]
    doses = [[float(dose)] for dose in config.sweep] or [list(map(float, config.dose or (usual,)))]
    said = [dose[:1] if len(set(dose)) == 1 else dose for dose in doses]
    return [PlannedArm(f"dose {', '.join(f'{d:g}' for d in s)}", dose) for s, dose in zip(said, doses, strict=True)]


def no_features() -> UserError:
    """What is said where a dictionary is to steer with nothing."""
    return UserError("the features", "there is none to steer with", "give at least one, like --feature 123")


def check_options(config: SteerOptions, n_prompts: int, decoding: DecodeConfig) -> None:
    """What can be known before a model is loaded.

    Raises:
        UserError: something is missing, or not allowed.
    """
    if not n_prompts:
        raise UserError(
            "the prompts", "there is none", "give at least one text, before options that take several values"
        )
    check_least(config, 1, "samples")
    if config.controls and not config.kl:
        why = "whether texts are ordinary is read in the pass that measures KL"
        raise UserError("controls without KL", why, "leave --no-kl out")
    if config.samples > 1 and decoding.temperature == 0:
        raise UserError(
            f"samples = {config.samples}", "greedy decoding gives the same text every time", "set a temperature"
        )
    if config.sweep and config.dose:
        raise UserError("a dose beside a sweep", "the sweep says the doses", "leave one of them out")
    check_doses(config.sweep or config.dose)
    given = "a sweep" if config.sweep else "a dose" if config.dose else ""
    if given and not operation_named(config.operation).has_dose:
        raise UserError(given, f"operation {config.operation} has no dose", "leave it out, or use operation scale")
