"""Steer with features: unsteered and steered continuations of the same prompts, with a trace of every edit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from trimtab.dictionaries import AnyModelConfig, Dictionary
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, Decoded, DecodingConfig, LanguageModel, decode, site_width
from trimtab.lm.rows import check_prompts
from trimtab.runs import Meter, Run, check_least, read_typed
from trimtab.steering.doses import DEFAULT_DOSE, DEFAULT_UNIT, check_doses
from trimtab.steering.effects import TokenEffects, token_effects
from trimtab.steering.equal_dose import dose_summary
from trimtab.steering.operations import operation_named
from trimtab.steering.replay import ReplayReport, replay
from trimtab.steering.result import Arm, Continuation, SteerResult
from trimtab.steering.sources import StaticSource
from trimtab.steering.trace import Trace

UNSTEERED = "unsteered"


@dataclass(frozen=True, kw_only=True)
class SteerOptions:
    """With which features, how strongly and where, and what is measured."""

    feature: tuple[int, ...] = ()
    """Features to steer with, all at once."""
    dose: tuple[float, ...] = (DEFAULT_DOSE,)
    """How strongly: one number, or one per feature."""
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


@dataclass(frozen=True, kw_only=True)
class SteerConfig(SteerOptions, DecodingConfig, AnyModelConfig):
    """Continuations of prompts, unsteered and with features added, clamped or removed."""

    prompt: tuple[str, ...] = ()
    """Texts to continue."""
    stop: tuple[str, ...] = ()
    """End a text that contains one of these."""
    seed: int = 0
    """Of the sampling. All arms share the same draws."""
    run: str | None = None
    """Directory to write the trace to."""
    replay: str | None = None
    """Replay the run in this directory instead: apply its edits again and re-decide every token."""

    @property
    def decoding(self) -> DecodeConfig:
        """How tokens are chosen."""
        return self.decode_config(stop=self.stop)


def run_steer(config: SteerConfig) -> SteerResult | ReplayReport:
    """What `trimtab steer` does.

    A run that is done is not done again: its result is read back.

    Raises:
        UserError: something in the config is wrong, or does not fit the model, the dictionary or the run directory.
    """
    if config.replay is not None:
        with Meter(f"replaying {config.replay}") as meter:
            return replay(config.replay, progress=meter.advance)
    _check(config, len(config.prompt), config.decoding)
    model, dictionary = config.load()
    plan = _plan(config, model, dictionary, config.prompt, config.decoding)
    if config.run is None:
        return _steered(plan, model)
    with Run.open(config.run, "steer", config, device=config.device, ignore_fields=("run", "any_model")) as run:
        run.record(hashes={"model": model.fingerprint, "dictionary": dictionary.fingerprint})
        if run.done and run.results:
            return read_typed(SteerResult, run.results, f"run {config.run}")
        result = _steered(plan, model, run)
        run.finish(results=result.to_json())
        return result


def steer(
    model: LanguageModel,
    dictionary: Dictionary,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    features: int | Sequence[int],
    dose: float | Sequence[float] = DEFAULT_DOSE,
    *,
    decoding: DecodeConfig | None = None,
    **options: Any,
) -> SteerResult:
    """Continue prompts unsteered and steered.

    Args:
        model: the model.
        dictionary: whose features steer.
        prompts: one text, several, or token ids.
        features: one id, or several that are used at once.
        dose: one for all features, or one each.
        decoding: how tokens are chosen.
        options: any further fields of `SteerOptions`, such as `unit`, `sweep`, `operation`, `positions` or `samples`.

    Returns:
        Texts, realised doses and effects, the unsteered arm first.

    Raises:
        UserError: a value is not allowed, or does not fit the model or the dictionary.
    """
    chosen = SteerOptions(
        feature=(features,) if isinstance(features, int) else tuple(features),
        dose=(dose,) if isinstance(dose, int | float) else tuple(dose),
        **options,
    )
    given = [prompts] if isinstance(prompts, str) else prompts
    return _steered(_plan(chosen, model, dictionary, given, decoding or DecodeConfig()), model)


def _steered(plan: _Plan, model: LanguageModel, run: Run | None = None) -> SteerResult:
    """Decode what is planned, and write the trace into a run, if there is one."""
    config, names, rows, source = plan.options, plan.names, plan.rows, plan.source
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
    if run is not None:
        Trace.of(
            model, decoded, plan.decoding, source, effects=effects, run=os.fspath(run.path), branches=branches
        ).write(run)
    members = [[i for i, arm in enumerate(branches) if arm == index] for index in range(len(names))]
    return SteerResult(
        model=model.name,
        site=str(source.sites[0]),
        features=list(config.feature),
        operation=config.operation,
        unit=source.unit,
        positions=config.positions,
        prompts=plan.texts,
        arms=[
            _arm(name, plan.doses[index], members[index], decoded, effects, rows) for index, name in enumerate(names)
        ],
        run=None if run is None else os.fspath(run.path),
    )


class _Row(NamedTuple):
    """One row to decode."""

    prompt: int
    sample: int  # of the prompt
    key: int  # of its random draws, shared by all arms
    arm: int


class _Plan(NamedTuple):
    """What options come to, with a model and a dictionary at hand."""

    options: SteerOptions
    texts: list[str]
    ids: list[list[int]]
    names: list[str]  # of the arms, unsteered first
    doses: list[list[float] | None]  # per arm
    rows: list[_Row]
    source: StaticSource
    decoding: DecodeConfig


def _plan(
    config: SteerOptions,
    model: LanguageModel,
    dictionary: Dictionary,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    decoding: DecodeConfig,
) -> _Plan:
    """Everything that can be wrong is found here, before anything is written."""
    _check(config, len(prompts), decoding)
    site = config.site or dictionary.info.site or None
    if site is not None:
        dictionary.check_model(site_width(model, model.site(site)), model.name, config.site)
    dictionary.check_features(list(config.feature))
    ids = [model.encode_text(p, chat=config.chat) if isinstance(p, str) else list(p) for p in prompts]
    check_prompts(model, ids, decoding)
    doses = _doses(config)
    arms: list[list[float] | None] = [None, *doses]
    rows = [
        _Row(prompt, sample, prompt * config.samples + sample, arm)
        for prompt in range(len(ids))
        for sample in range(config.samples)
        for arm in range(len(arms))
    ]
    nothing, still = [-1] * len(config.feature), [0.0] * len(config.feature)
    source = StaticSource(
        dictionary,
        torch.tensor([list(config.feature) if row.arm else nothing for row in rows]),
        torch.tensor([arms[row.arm] or still for row in rows]),
        site,
        unit=config.unit,
        operation=config.operation,
        positions=config.positions,
        combine=config.combine,
    )
    return _Plan(
        options=config,
        texts=[p if isinstance(p, str) else model.decode_ids(p, special=True) for p in prompts],
        ids=ids,
        names=[UNSTEERED, *(_name(config, dose) for dose in doses)],
        doses=arms,
        rows=rows,
        source=source,
        decoding=decoding,
    )


def _arm(
    name: str,
    dose: list[float] | None,
    members: list[int],
    decoded: Decoded,
    effects: TokenEffects | None,
    rows: list[_Row],
) -> Arm:
    def mean(pick: Callable[[TokenEffects], list[list[float]]], sign: float = 1.0) -> float | None:
        if effects is None:
            return None
        values = list(itertools.chain.from_iterable(pick(effects)[i] for i in members))
        return sign * sum(values) / len(values)

    mine = torch.isin(decoded.edits.row, torch.tensor(members))
    return Arm(
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


def _doses(config: SteerOptions) -> list[list[float]]:
    """Per steered arm, each feature's dose."""
    n = len(config.feature)
    if not operation_named(config.operation).has_dose:
        return [[0.0] * n]
    if config.sweep:
        return [[float(dose)] * n for dose in config.sweep]
    return [list(map(float, config.dose)) if len(config.dose) == n else [float(config.dose[0])] * n]


def _name(config: SteerOptions, dose: list[float]) -> str:
    if not operation_named(config.operation).has_dose:
        return config.operation.removesuffix("e") + "ed"
    return "dose " + (f"{dose[0]:g}" if len(set(dose)) == 1 else ", ".join(f"{d:g}" for d in dose))


def _check(config: SteerOptions, n_prompts: int, decoding: DecodeConfig) -> None:
    if not n_prompts:
        raise UserError("the prompts", "there is none", "give at least one text")
    if not config.feature:
        raise UserError("the features", "there is none to steer with", "give at least one, like --feature 123")
    check_least(config, 1, "samples")
    if config.samples > 1 and decoding.temperature == 0:
        raise UserError(
            f"samples = {config.samples}", "greedy decoding gives the same text every time", "set a temperature"
        )
    check_doses(config.sweep or config.dose)
    if not config.sweep and len(config.dose) not in (1, len(config.feature)):
        raise UserError(
            f"{len(config.dose)} doses", f"there are {len(config.feature)} features", "give one dose, or one for each"
        )
    if config.sweep and not operation_named(config.operation).has_dose:
        raise UserError("a sweep", f"operation {config.operation} has no dose", "leave it out, or use operation scale")
