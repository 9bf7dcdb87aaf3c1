"""`trimtab steer`: load a model and an SAE, steer with its features, and write the trace into a run; or replay one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from trimtab.dictionaries import AnyModelConfig
from trimtab.dictionaries.meanings import name_features
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, DecodingConfig, LanguageModel
from trimtab.runs import LEFT_OUT_AT_DEFAULT, Meter, OutputPath, Run, part_of, read_typed
from trimtab.steering.doses import DEFAULT_DOSE
from trimtab.steering.planning import SteeringPlan, SteerOptions, check_options, no_features, plan_steering
from trimtab.steering.result import SteerResult
from trimtab.steering.saved_steering import Steering, check_free, load
from trimtab.steering.scored import Score, of_row
from trimtab.steering.sources import StaticSource
from trimtab.steering.steered import steered
from trimtab.steering.steering_facts import Evidence
from trimtab.steering.trace import Trace
from trimtab.steering.trace_replay import ReplayReport, replay


@dataclass(frozen=True, kw_only=True)
class SteerConfig(SteerOptions, DecodingConfig, AnyModelConfig):
    """Continue prompts, unsteered and with features added, clamped or removed; or replay such a run."""

    needs = ("decode",)

    prompt: tuple[str, ...] = ()
    """Texts to continue."""
    feature_name: tuple[str, ...] = field(default=(), metadata=LEFT_OUT_AT_DEFAULT)
    """Features by what they mean (IO=Mary), where the SAE says it; beside those given by number."""
    steering: tuple[Path, ...] = field(default=(), metadata={**LEFT_OUT_AT_DEFAULT, "option": "with"})
    """Directories of saved steerings to steer with, all at once, instead of features; doses multiply theirs."""
    score: Path | None = field(default=None, metadata=LEFT_OUT_AT_DEFAULT)
    """A run of trimtab find: show each arm's effect on its wish, on those of its examples that chose nothing."""
    save: OutputPath | None = field(default=None, metadata=LEFT_OUT_AT_DEFAULT)
    """Save what steers as a steering in this directory."""
    stop: tuple[str, ...] = ()
    """End a text that contains one of these."""
    seed: int = 0
    """Of the sampling. All arms share the same draws."""
    run: Path | None = None
    """Directory to write the trace to."""
    replay: Path | None = None
    """Replay the run in this directory instead: apply its edits again and re-decide every token."""

    @property
    def decoding(self) -> DecodeConfig:
        """How tokens are chosen."""
        return self.decode_config(stop=self.stop)


def steer_defaults(given: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What a saved steering says of fields that the words leave out: its model."""
    if not given.get("with") or "model" in given:
        return {}
    return {"model": load(given["with"][0]).model.name}


def run_steer(
    config: SteerConfig,
    *,
    load: Callable[[Path], LanguageModel | None] | None = None,
    scorer: Callable[[Path, LanguageModel], Score] | None = None,
) -> SteerResult | ReplayReport:
    """What `trimtab steer` does.

    A run that is done is not done again: its result is read back.

    Args:
        config: what to do.
        load: loads the model of a run to replay whose record alone does not say how; None leaves it to the record.
        scorer: from a run of find and its model to what scores arms by its wish.

    Raises:
        UserError: something in the config is wrong, or does not fit the model, the dictionary or the run directory.
    """
    if config.replay is not None:
        for one in fields(config):  # the run holds its prompts, features and all
            if one.name != "replay" and getattr(config, one.name) != one.default:
                option = one.metadata.get("option", one.name)
                name = option if option == "prompt" else f"--{option.replace('_', '-')}"
                raise UserError(f"{name} with --replay", "a replay takes it from the run", "leave it out")
        with Meter(f"replaying {config.replay}") as meter:
            model = None if load is None else load(config.replay)
            return replay(config.replay, model=model, progress=meter.advance)
    options = SteerOptions(**part_of(config, SteerOptions))
    if not config.feature and not config.feature_name and not config.steering:
        raise no_features()
    check_options(options, len(config.prompt), config.decoding)
    _check_saving(config)
    if config.steering:
        return _run_saved(config, options, scorer)
    model, dictionary = config.load()
    named = dictionary.features_named(config.feature_name)
    config = replace(config, feature=(*config.feature, *named), feature_name=())
    options = replace(options, feature=config.feature)
    plan = _with_score(plan_steering(options, model, dictionary, config.prompt, config.decoding), config, model, scorer)
    config = replace(config, dose=config.dose or (DEFAULT_DOSE,))  # what a run records
    if config.run is None:
        result = steered(plan, model)
    else:
        with Run.open(config.run, "steer", config, device=config.device, ignore_fields=_NOT_THE_RESULT) as run:
            run.record(hashes={"model": model.fingerprint, "dictionary": dictionary.fingerprint})
            name_features(run, model, dictionary, config.feature)
            result = steered_in(run, plan, model)
    if config.save is not None:
        _steering_of(plan, model, result).save(config.save)
    return result


_Scorer = Callable[[Path, LanguageModel], Score] | None
_NOT_THE_RESULT = ("run", "any_model", "save")


def _with_score(plan: SteeringPlan, config: SteerConfig, model: LanguageModel, scorer: _Scorer) -> SteeringPlan:
    """The plan with what scores its arms."""
    if config.score is None or scorer is None:
        return plan
    of_row(plan.source, 1)
    return plan._replace(score=scorer(config.score, model))


def _run_saved(config: SteerConfig, options: SteerOptions, scorer: _Scorer) -> SteerResult:
    """Steer with what was saved."""
    if config.feature_name:
        raise UserError("--feature-name beside --with", "a saved steering says what steers", "leave it out")
    saved = [load(path) for path in config.steering]
    model = config.load_model()
    plan = plan_steering(options, model, saved, config.prompt, config.decoding, any_model=config.any_model)
    plan = _with_score(plan, config, model, scorer)
    if config.run is None:
        return steered(plan, model)
    with Run.open(config.run, "steer", config, device=config.device, ignore_fields=_NOT_THE_RESULT) as run:
        run.record(hashes={"model": model.fingerprint, "steering": "+".join(one.fingerprint for one in saved)})
        return steered_in(run, plan, model)


def _check_saving(config: SteerConfig) -> None:
    """Refuse to save what has no one dose, or is saved already; before anything is loaded."""
    if config.save is None:
        return
    if config.sweep:
        raise UserError(
            "--save beside --sweep", "a sweep tries several doses", "save with the one --dose that you choose"
        )
    if config.steering:
        raise UserError("--save beside --with", "it is saved already", "leave one of them out")
    check_free(config.save)


def _steering_of(plan: SteeringPlan, model: LanguageModel, result: SteerResult) -> Steering:
    """What one arm was steered with, with the norms and the divergence that its texts came to."""
    assert result.trace is not None
    assert isinstance(plan.source, StaticSource)
    norms = result.trace.edits.group_by("site").aggregate([("x_norm", "approximate_median")])
    (arm,) = result.steered
    evidence = [Evidence(name="KL to unsteered", value=arm.kl_total, unit="nats per token")] if arm.kl_total else []
    return Steering.of(
        model, plan.source, row=1, about=result.steered_with, made_by="steer", evidence=evidence,
        norms=dict(zip(*(norms[name].to_pylist() for name in ("site", "x_norm_approximate_median")), strict=True)),
    )  # fmt: skip


def steered_in(run: Run, plan: SteeringPlan, model: LanguageModel) -> SteerResult:
    """Decode what is planned in a run, which keeps result and trace; of one that is done they are read back."""
    if run.done and run.results:
        result = read_typed(SteerResult, run.results, f"run {run.path}")
        return replace(result, trace=Trace.read(run.path))
    result = replace(steered(plan, model, os.fspath(run.path)), run=os.fspath(run.path))
    assert result.trace is not None
    result.trace.write(run)
    run.finish(results=result.to_json())
    return result
