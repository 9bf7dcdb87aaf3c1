"""Steer: unsteered and steered continuations of the same prompts, with a trace of every edit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.base import check_is_dictionary
from trimtab.errors import UserError
from trimtab.lm import (
    DecodeConfig,
    Decoded,
    InterventionSource,
    LanguageModel,
    PositionRule,
    Site,
    decode,
    site_width,
)
from trimtab.lm.model import check_is_model
from trimtab.lm.row import check_prompts
from trimtab.runs import Meter, check_least, field_types, plain, read_keywords, whole_numbers
from trimtab.steering.composed_sources import SomeRowsSource
from trimtab.steering.direction_table import DirectionTable
from trimtab.steering.doses import DEFAULT_DOSE, DEFAULT_UNIT, check_doses
from trimtab.steering.effects import TokenEffects, token_effects
from trimtab.steering.equal_dose import dose_summary
from trimtab.steering.operations import operation_named
from trimtab.steering.result import Continuation, DoseResult, SteerResult
from trimtab.steering.sources import PerSite, StaticSource, as_vector, by_site, check_heads, head_shapes, vector_table
from trimtab.steering.trace import Trace

UNSTEERED = "unsteered"
Prompts = str | Sequence[str] | Sequence[Sequence[int]]


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


def steer(
    model: LanguageModel,
    directions: PerSite[Dictionary | DirectionTable | Tensor] | InterventionSource,
    prompts: Prompts,
    features: int | str | Sequence[int | str] | None = None,
    dose: float | Sequence[float] | None = None,
    *,
    keep_length: bool = False,
    decoding: DecodeConfig | None = None,
    **options: Any,
) -> SteerResult:
    """Continue prompts unsteered and steered.

    Args:
        model: the model.
        directions: what steers: a dictionary, with some of its `features`; a vector, or several at once, whose last
            dimensions together hold the site's width (`[d]`, `[n, d]`, `[heads, head_dim]`, …); one of these for each
            of several sites, by name; or any source of interventions, which decides everything itself.
        prompts: one text, several, or token ids.
        features: one id, or several that are used at once; all rows of vectors by default. Features of a dictionary
            that says what they mean may be given by that (`IO=Mary`).
        dose: one for all features, or one each; 0.4 by default, with `keep_length` 1.
        keep_length: doses are multiples of each vector as it is, so that 1 adds it; otherwise only directions count.
        decoding: how tokens are chosen.
        options: any further fields of `SteerOptions`, such as `site`, `unit`, `sweep`, `operation`, `positions` or
            `samples`; and of `DecodeConfig`, such as `max_new_tokens`, `temperature` and `seed`, instead of those in
            `decoding`.

    Returns:
        Texts, realised doses and effects, the unsteered arm first, and the trace.

    Raises:
        UserError: a value is not allowed, or does not fit the model or the dictionary.
    """
    check_is_model(model)
    if directions is None or (isinstance(directions, str | os.PathLike | torch.nn.Module) and not _decides(directions)):
        check_is_dictionary(directions)
    options = {"unit": "absolute", **options} if keep_length else options
    if options.get("site") is not None:
        options["site"] = str(Site.parse(options["site"]))
    if "positions" in options:
        options["positions"] = str(PositionRule.parse(options["positions"]))
    known = {**field_types(SteerOptions), **field_types(DecodeConfig)}
    known = {name: kind for name, kind in known.items() if name not in ("feature", "dose")}
    options = read_keywords(options, known, steer)
    tokens = {name: options.pop(name) for name in field_types(DecodeConfig) if name in options}
    dose = () if dose is None else plain(dose)
    if dose == []:
        raise UserError("the doses", "there is none", "give one, or leave them out")
    chosen = SteerOptions(
        feature=() if features is None else tuple(whole_numbers(_by_number(features, directions), "feature")),
        dose=tuple(dose) if isinstance(dose, list | tuple) else (dose,),  # type: ignore[arg-type]
        **options,
    )
    if not isinstance(prompts, str | Iterable):
        raise UserError(f"prompts {prompts!r}", "they are no texts", "give one text, or a list")
    given: Any = [prompts] if isinstance(prompts, str) else list(prompts)
    decoding = replace(decoding or DecodeConfig(), **tokens)
    return steered(plan_steering(chosen, model, directions, given, decoding, keep_length=keep_length), model)


def _by_number(features: Any, directions: object) -> Any:
    """Features with those that a dictionary has by name as their numbers."""
    given = [features] if isinstance(features, str) else features
    if not isinstance(directions, Dictionary) or not isinstance(given, list | tuple):
        return features
    named = [isinstance(one, str) and not one.strip("-").isdigit() for one in given]  # "35" is refused as a number is
    return [directions.features_named([one])[0] if by else one for one, by in zip(given, named, strict=True)]


def steered(plan: SteeringPlan, model: LanguageModel, run: str = "") -> SteerResult:
    """Decode what is planned.

    Args:
        plan: of `plan_steering`.
        model: its model.
        run: name of the run in the trace.
    """
    config, rows, source = plan.options, plan.rows, plan.source
    branches = [row.arm for row in rows]
    with Meter("decoding", len(rows)) as meter:
        decoded = decode(
            model,
            [plan.ids[row.prompt] for row in rows],
            plan.decoding,
            source,
            samples=[row.key for row in rows],
            branches=[0] * len(rows),  # arms share their draws
            progress=meter.advance,
        )
    effects = None
    if config.kl:
        with Meter("measuring KL", len(rows)) as meter:
            effects = token_effects(model, decoded, source, progress=meter.advance)
    members = [[i for i, arm in enumerate(branches) if arm == index] for index in range(len(plan.arms))]
    return SteerResult(
        model=model.name,
        site=", ".join(map(str, source.sites)),
        steered_with=plan.steered_with,
        features=list(config.feature),
        operation=source.operation,
        unit=source.unit,
        positions=plan.positions,
        prompts=plan.texts,
        arms=[_arm(*arm, mine, decoded, effects, rows) for arm, mine in zip(plan.arms, members, strict=True)],
        run=None,
        trace=Trace.of(model, decoded, plan.decoding, source, effects=effects, run=run, branches=branches),
    )


class _Row(NamedTuple):
    """One row to decode."""

    prompt: int
    sample: int  # of the prompt
    key: int  # of its random draws, shared by all arms
    arm: int


class _PlannedArm(NamedTuple):
    """One way to steer all prompts."""

    name: str
    dose: list[float] | None = None  # of all features or each one's own; None where it is not for the plan to say


class SteeringPlan(NamedTuple):
    """Checked options, with the model and directions."""

    options: SteerOptions
    texts: list[str]
    ids: list[list[int]]
    arms: list[_PlannedArm]  # unsteered first
    rows: list[_Row]
    source: InterventionSource
    steered_with: str
    positions: str
    decoding: DecodeConfig


def plan_steering(
    config: SteerOptions,
    model: LanguageModel,
    directions: PerSite[Dictionary | DirectionTable | Tensor] | InterventionSource,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    decoding: DecodeConfig,
    *,
    keep_length: bool = False,
) -> SteeringPlan:
    """Everything that can be wrong is found here, before anything is written.

    Raises:
        UserError: as `steer`.
    """
    check_options(config, len(prompts), decoding)
    decides = _decides(directions)
    tables = {} if decides else _tables(config, model, directions, keep_length)  # type: ignore[arg-type]
    ids = [model.encode_text(p, chat=config.chat) if isinstance(p, str) else _tokens(p) for p in prompts]
    check_prompts(model, ids, decoding)
    usual = 1.0 if keep_length else DEFAULT_DOSE
    arms = [_PlannedArm(UNSTEERED), *([_PlannedArm("steered")] if decides else _steered_arms(config, usual))]
    rows = [
        _Row(prompt, sample, prompt * config.samples + sample, arm)
        for prompt in range(len(ids))
        for sample in range(config.samples)
        for arm in range(len(arms))
    ]
    if decides:
        source, what = _alone(config, directions, rows)  # type: ignore[arg-type]
    else:
        source, what = _of_tables(config, tables, arms, rows)
    return SteeringPlan(
        options=config,
        texts=[p if isinstance(p, str) else model.decode_ids(p, special=True) for p in prompts],
        ids=ids,
        arms=arms,
        rows=rows,
        source=source,
        steered_with=what,
        positions=str(source.positions) if decides else config.positions,
        decoding=decoding,
    )


def _decides(directions: object) -> bool:
    """Whether it is a source, which decides everything itself."""
    return hasattr(directions, "sites")


def _arm(
    name: str,
    dose: list[float] | None,
    members: list[int],
    decoded: Decoded,
    effects: TokenEffects | None,
    rows: list[_Row],
) -> DoseResult:
    def mean(pick: Callable[[TokenEffects], list[list[float]]], sign: float = 1.0) -> float | None:
        if effects is None:
            return None
        values = list(itertools.chain.from_iterable(pick(effects)[i] for i in members))
        return sign * sum(values) / len(values)

    mine = torch.isin(decoded.edits.row, torch.tensor(members))
    return DoseResult(
        name=name,
        dose=None if dose is None else dose[0] if len(set(dose)) == 1 else dose,
        realised=dose_summary(decoded.edits.take(mine)),
        kl_local=mean(lambda e: e.kl_local),
        kl_total=mean(lambda e: e.kl_total),
        unsteered_nll=mean(lambda e: e.unsteered_logp, sign=-1.0),
        continuations=[
            Continuation(
                prompt=rows[i].prompt,
                sample=rows[i].sample,
                text=decoded.texts[i],
                n_tokens=len(decoded.token_ids[i]),
                finish=decoded.finish[i],
            )
            for i in members
        ],
    )


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
    arms: Sequence[_PlannedArm],
    rows: Sequence[_Row],
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


_OF_ANY_SOURCE = ("chat", "samples", "kl")


def _alone(config: SteerOptions, source: InterventionSource, rows: Sequence[_Row]) -> tuple[InterventionSource, str]:
    """A source that decides everything itself, in the steered rows."""
    name, usual = getattr(source, "label", type(source).__name__), SteerOptions()
    for field in fields(config):
        if field.name not in _OF_ANY_SOURCE and getattr(config, field.name) != getattr(usual, field.name):
            raise UserError(f"{field.name} beside {name}", "the source decides that itself", "leave it out")
    return SomeRowsSource(source, [row.arm == 1 for row in rows]), name


def _tokens(prompt: Sequence[int]) -> list[int]:
    """The token ids of a prompt."""
    if not isinstance(plain(prompt), list):
        raise UserError(f"prompt {prompt!r}", "it is neither a text nor token ids", "give texts, or lists of token ids")
    return whole_numbers(prompt, "token")


def _steered_arms(config: SteerOptions, usual: float) -> list[_PlannedArm]:
    """Per steered arm its name and the dose of all features or each one's own."""
    if not operation_named(config.operation).has_dose:
        return [_PlannedArm(config.operation.removesuffix("e") + "ed", [0.0])]
    doses = [[float(dose)] for dose in config.sweep] or [list(map(float, config.dose or (usual,)))]
    said = [dose[:1] if len(set(dose)) == 1 else dose for dose in doses]
    return [_PlannedArm(f"dose {', '.join(f'{d:g}' for d in s)}", dose) for s, dose in zip(said, doses, strict=True)]


def no_features() -> UserError:
    """What is said where a dictionary is to steer with nothing."""
    return UserError("the features", "there is none to steer with", "give at least one, like --feature 123")


def check_options(config: SteerOptions, n_prompts: int, decoding: DecodeConfig) -> None:
    """What can be known before a model is loaded.

    Raises:
        UserError: something is missing, or not allowed.
    """
    if not n_prompts:
        raise UserError("the prompts", "there is none", "give at least one text")
    check_least(config, 1, "samples")
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
