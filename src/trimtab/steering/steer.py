"""Steer with features: unsteered and steered continuations of the same prompts, with a trace of every edit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, Decoded, LanguageModel, decode, site_width
from trimtab.lm.decode import check_prompts
from trimtab.runs import Meter, Run, read_typed
from trimtab.steering.doses import DEFAULT_DOSE, DEFAULT_UNIT, check_doses
from trimtab.steering.effects import TokenEffects, token_effects
from trimtab.steering.equal_dose import dose_summary
from trimtab.steering.operations import operation_named
from trimtab.steering.replay import ReplayReport, replay
from trimtab.steering.result import Arm, Continuation, SteerResult
from trimtab.steering.sources import StaticSource
from trimtab.steering.trace import Trace

if TYPE_CHECKING:
    from trimtab.dictionaries.base import Dictionary

UNSTEERED = "unsteered"


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """Continuations of prompts, unsteered and with features added, clamped or removed."""

    prompt: tuple[str, ...] = ()
    """Texts to continue."""
    model: str = "smollm2-135m-instruct"
    """Hub id, directory, GGUF file or catalogue name."""
    sae: str = "default"
    """Directory of the SAE in any known format, a shipped one's name, or saelens:RELEASE/SAE_ID."""
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
    any_model: bool = False
    """Use the SAE on another model than the one that it was trained on, if the widths agree (a fine-tune, say)."""
    positions: str = "generated"
    """Input positions to edit: generated (those that choose a token), prompt, all, START:STOP, or a list like 3,-1."""
    chat: bool = False
    """Put each prompt into the model's chat template, as one user turn."""
    samples: int = 1
    """Continuations per prompt; more than one needs a temperature."""
    max_new_tokens: int = 64
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 decodes greedily."""
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this share of the probability."""
    stop: tuple[str, ...] = ()
    """End a text that contains one of these."""
    seed: int = 0
    """Of the sampling. All arms share the same draws."""
    batch_size: int = 64
    """Rows decoded together."""
    kl: bool = True
    """Measure each edit's effect on the next-token distribution; takes one more pass over the texts."""
    run: str | None = None
    """Directory to write the trace to."""
    replay: str | None = None
    """Replay the run in this directory instead: apply its edits again and re-decide every token."""
    dtype: str = "float32"
    """Precision of the model."""
    device: str = "cpu"
    """Where to compute."""

    @property
    def decoding(self) -> DecodeConfig:
        """How tokens are chosen."""
        return DecodeConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=self.stop,
            seed=self.seed,
            batch_size=self.batch_size,
        )


def run_steer(config: SteerConfig) -> SteerResult | ReplayReport:
    """What `trimtab steer` does.

    A run that is done is not done again: its result is read back.

    Raises:
        UserError: something in the config is wrong, or does not fit the model, the dictionary or the run directory.
    """
    from trimtab.dictionaries import load_dictionary
    from trimtab.lm import load_model

    if config.replay is not None:
        with Meter(f"replaying {config.replay}") as meter:
            return replay(config.replay, progress=meter.advance)
    _check(config)
    model = load_model(config.model, dtype=config.dtype, device=config.device)
    dictionary = load_dictionary(config.sae, model=model, any_model=config.any_model, device=config.device)
    if config.run is None:
        return steer_with(config, model, dictionary)
    _plan(config, model, dictionary)
    with Run.open(config.run, "steer", config, device=config.device, ignore_fields=("run", "any_model")) as run:
        run.record(hashes={"model": model.fingerprint, "dictionary": dictionary.fingerprint})
        if run.done and run.results:
            return read_typed(SteerResult, run.results, f"run {config.run}")
        result = steer_with(config, model, dictionary, run=run)
        run.finish(results=result.to_json())
        return result


def steer(
    model: LanguageModel,
    dictionary: Dictionary,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    features: int | Sequence[int],
    dose: float | Sequence[float] = DEFAULT_DOSE,
    *,
    unit: str = DEFAULT_UNIT,
    sweep: Sequence[float] = (),
    operation: str = "add",
    combine: str = "each",
    site: str | None = None,
    positions: str = "generated",
    chat: bool = False,
    samples: int = 1,
    decoding: DecodeConfig | None = None,
    kl: bool = True,
) -> SteerResult:
    """Continue prompts unsteered and steered.

    Args:
        model: the model.
        dictionary: whose features steer.
        prompts: one text, several, or token ids.
        features: one id, or several that are used at once.
        dose: one for all features, or one each.
        unit: `relative`, `max_activation` or `absolute`.
        sweep: doses to try one after the other, instead of `dose`.
        operation: `add`, `clamp`, `ablate`, `scale` or `overwrite`.
        combine: `each` or `total`, as in `DirectionSource`.
        site: where; by default the site that the dictionary names.
        positions: `generated`, `prompt`, `all`, `START:STOP`, or a list like `3,-1`.
        chat: put texts into the model's chat template.
        samples: continuations per prompt.
        decoding: how tokens are chosen.
        kl: measure effects on the next-token distribution.

    Returns:
        Texts, realised doses and effects, the unsteered arm first.

    Raises:
        UserError: a value is not allowed, or does not fit the model or the dictionary.
    """
    decoding = decoding or DecodeConfig()
    given: list[str] | list[list[int]]
    if isinstance(prompts, str):
        given = [prompts]
    else:
        given = [p if isinstance(p, str) else list(p) for p in prompts]  # type: ignore[assignment]
    config = SteerConfig(
        model=model.name,
        feature=(features,) if isinstance(features, int) else tuple(features),
        dose=(dose,) if isinstance(dose, int | float) else tuple(dose),
        sweep=tuple(sweep),
        unit=unit,
        operation=operation,
        combine=combine,
        site=site,
        positions=positions,
        chat=chat,
        samples=samples,
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        stop=decoding.stop,
        seed=decoding.seed,
        batch_size=decoding.batch_size,
        kl=kl,
    )
    return steer_with(config, model, dictionary, prompts=given, decoding=decoding)


def steer_with(
    config: SteerConfig,
    model: LanguageModel,
    dictionary: Dictionary,
    *,
    prompts: Sequence[str] | Sequence[list[int]] | None = None,
    decoding: DecodeConfig | None = None,
    run: Run | None = None,
) -> SteerResult:
    """`run_steer` with a loaded model and dictionary.

    Args:
        config: what to do; `model`, `sae`, `run` and `replay` are not looked at.
        model: the model.
        dictionary: the dictionary.
        prompts: texts or token ids, instead of the config's prompts.
        decoding: instead of the config's.
        run: the trace is written into it.

    Raises:
        UserError: a value is not allowed, or does not fit the model or the dictionary.
    """
    plan = _plan(config, model, dictionary, prompts, decoding)
    names, rows, source, decoding = plan.names, plan.rows, plan.source, plan.decoding
    branches = [row.arm for row in rows]
    with Meter("decoding", len(rows)) as meter:
        decoded = decode(
            model,
            [plan.ids[row.prompt] for row in rows],
            decoding,
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
        Trace.of(model, decoded, decoding, source, effects=effects, run=os.fspath(run.path), branches=branches).write(
            run
        )
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
    """What a config comes to, with a model and a dictionary at hand."""

    texts: list[str]
    ids: list[list[int]]
    names: list[str]  # of the arms, unsteered first
    doses: list[list[float] | None]  # per arm
    rows: list[_Row]
    source: StaticSource
    decoding: DecodeConfig


def _plan(
    config: SteerConfig,
    model: LanguageModel,
    dictionary: Dictionary,
    prompts: Sequence[str] | Sequence[list[int]] | None = None,
    decoding: DecodeConfig | None = None,
) -> _Plan:
    """Everything that can be wrong is found here, before anything is written."""
    given = config.prompt if prompts is None else prompts
    _check(config, n_prompts=len(given))
    decoding = decoding or config.decoding
    site = config.site or dictionary.info.site or None
    if site is not None:
        dictionary.check_model(site_width(model, model.site(site)), model.name, config.site)
    dictionary.check_features(list(config.feature))
    ids = [model.encode_text(p, chat=config.chat) if isinstance(p, str) else list(p) for p in given]
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
        texts=[p if isinstance(p, str) else model.decode_ids(p, special=True) for p in given],
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


def _doses(config: SteerConfig) -> list[list[float]]:
    """Per steered arm, each feature's dose."""
    n = len(config.feature)
    if not operation_named(config.operation).has_dose:
        return [[0.0] * n]
    if config.sweep:
        return [[float(dose)] * n for dose in config.sweep]
    return [list(map(float, config.dose)) if len(config.dose) == n else [float(config.dose[0])] * n]


def _name(config: SteerConfig, dose: list[float]) -> str:
    if not operation_named(config.operation).has_dose:
        return config.operation.removesuffix("e") + "ed"
    return "dose " + (f"{dose[0]:g}" if len(set(dose)) == 1 else ", ".join(f"{d:g}" for d in dose))


def _check(config: SteerConfig, n_prompts: int | None = None) -> None:
    if not (len(config.prompt) if n_prompts is None else n_prompts):
        raise UserError("the prompts", "there is none", "give at least one text")
    if not config.feature:
        raise UserError("the features", "there is none to steer with", "give at least one, like --feature 123")
    if config.samples < 1:
        raise UserError(f"samples = {config.samples}", "it must be at least 1", "change it")
    if config.samples > 1 and config.temperature == 0:
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
    _ = config.decoding
