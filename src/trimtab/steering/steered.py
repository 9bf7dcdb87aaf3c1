"""Steer: unsteered and steered continuations of the same prompts, with a trace of every edit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import torch

from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.base import check_is_dictionary
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, Decoded, LanguageModel, PositionRule, Site, decode
from trimtab.lm.model import check_is_model
from trimtab.runs import Meter, field_types, plain, read_keywords, whole_numbers
from trimtab.steering.effects import TokenEffects, token_effects
from trimtab.steering.equal_dose import dose_summary
from trimtab.steering.ordinary_texts import fluency, ordinary_text
from trimtab.steering.planning import (
    Directions,
    PlannedArm,
    PlannedRow,
    SteeringPlan,
    SteerOptions,
    decides,
    plan_steering,
)
from trimtab.steering.random_arms import EqualDoseSource, decode_controls
from trimtab.steering.result import Continuation, DoseResult, SteerResult
from trimtab.steering.scored import of_control, of_row
from trimtab.steering.trace import Trace

Prompts = str | Sequence[str] | Sequence[Sequence[int]]


def steer(
    model: LanguageModel,
    directions: Directions,
    prompts: Prompts,
    features: int | str | Sequence[int | str] | None = None,
    dose: float | Sequence[float] | None = None,
    *,
    keep_length: bool = False,
    any_model: bool = False,
    decoding: DecodeConfig | None = None,
    **options: Any,
) -> SteerResult:
    """Continue prompts unsteered and steered.

    Args:
        model: the model.
        directions: what steers: a dictionary, with some of its `features`; a vector, or several at once, whose last
            dimensions together hold the site's width (`[d]`, `[n, d]`, `[heads, head_dim]`, …); one of these for each
            of several sites, by name; a saved `Steering`, or several at once; or any source of interventions, which
            decides everything itself.
        prompts: one text, several, or token ids.
        features: one id, or several that are used at once; all rows of vectors by default. Features of a dictionary
            that says what they mean may be given by that (`IO=Mary`).
        dose: one for all features, or one each; 0.4 by default, with `keep_length` 1. Those of a saved steering are
            multiplied by it.
        keep_length: doses are multiples of each vector as it is, so that 1 adds it; otherwise only directions count.
        any_model: let a saved steering steer another model than the one that it is for, if widths agree.
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
    if directions is None or (isinstance(directions, str | os.PathLike | torch.nn.Module) and not decides(directions)):
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
    if decoding is not None and not isinstance(decoding, DecodeConfig):
        hint = "give trimtab.lm.DecodeConfig(max_new_tokens=…), or its fields to steer itself"
        raise UserError(f"the {type(decoding).__name__} that is given as decoding", "it is no DecodeConfig", hint)
    decoding = replace(decoding or DecodeConfig(), **tokens)
    plan = plan_steering(chosen, model, directions, given, decoding, keep_length=keep_length, any_model=any_model)
    return steered(plan, model)


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
    config, rows, source, arms = plan.options, plan.rows, plan.source, plan.arms
    calls: list[int] = []
    control: EqualDoseSource | None = None
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
    if plan.pool:
        of_arms = [i for i, row in enumerate(rows) if row.arm]
        decoded, source, calls, control = decode_controls(
            model, decoded, source, plan.decoding, rows=of_arms, pool=plan.pool, exclude=plan.under_test
        )
        rows = [*rows, *(rows[i]._replace(arm=rows[i].arm + len(arms) - 1) for i in of_arms)]
        kind = " directions" if any(table.dictionary is None for table in plan.pool.values()) else ""
        arms = [*arms, *(PlannedArm(f"random{kind}, {arm.name}", control_of=arm.name) for arm in arms[1:])]
    effects = None
    if config.kl:
        with Meter("measuring KL", len(rows)) as meter:
            effects = token_effects(model, decoded, source, progress=meter.advance)
    members = [[i for i, row in enumerate(rows) if row.arm == index] for index in range(len(arms))]
    found = [_arm(arm, mine, decoded, effects, rows) for arm, mine in zip(arms, members, strict=True)]
    scored = None
    if plan.score is not None:
        groups = [[of_row(plan.source, mine[0])] for mine in members[1 : len(plan.arms)]]
        if control is not None:
            places = {row: i for i, row in enumerate(i for i, row in enumerate(plan.rows) if row.arm)}
            groups += [of_control(control, [places[row] for row in mine]) for mine in members[1 : len(plan.arms)]]
        scored = plan.score(groups)
        found[1:] = [replace(arm, score=effect) for arm, effect in zip(found[1:], scored.effects, strict=True)]
    ordinary = None
    if plan.pool and effects is not None:
        nll = [-mean(logp) for logp in effects.unsteered_logp]
        texts = [([nll[i] for i in mine], [decoded.token_ids[i] for i in mine]) for mine in members]
        ordinary = ordinary_text(model, plan.decoding, *texts[0], chat=config.chat)
        found = [
            replace(arm, fluency=fluency(ordinary, *each, len(plan.ids), plan.decoding.seed))
            for arm, each in zip(found, texts, strict=True)
        ]
    return SteerResult(
        model=model.name,
        site=", ".join(map(str, source.sites)),
        steered_with=plan.steered_with,
        words=plan.words,
        features=list(config.feature),
        operation=plan.source.operation,
        unit=plan.source.unit,
        positions=plan.positions,
        prompts=plan.texts,
        arms=found,
        ordinary=ordinary,
        score_unit="" if scored is None else scored.unit,
        run=None,
        trace=Trace.of(
            model, decoded, plan.decoding, source, effects=effects, run=run, branches=[row.arm for row in rows],
            calls=calls,
        ),
    )  # fmt: skip


def _arm(
    arm: PlannedArm,
    members: list[int],
    decoded: Decoded,
    effects: TokenEffects | None,
    rows: Sequence[PlannedRow],
) -> DoseResult:
    def average(pick: Callable[[TokenEffects], list[list[float]]], sign: float = 1.0) -> float | None:
        if effects is None:
            return None
        values = list(itertools.chain.from_iterable(pick(effects)[i] for i in members))
        return sign * sum(values) / len(values)

    mine, dose = torch.isin(decoded.edits.row, torch.tensor(members)), arm.dose
    return DoseResult(
        name=arm.name,
        dose=None if dose is None else dose[0] if len(set(dose)) == 1 else dose,
        control_of=arm.control_of,
        realised=dose_summary(decoded.edits.take(mine)),
        kl_local=average(lambda e: e.kl_local),
        kl_total=average(lambda e: e.kl_total),
        unsteered_nll=average(lambda e: e.unsteered_logp, sign=-1.0),
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
