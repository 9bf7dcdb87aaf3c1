"""`trimtab steer`: load a model and an SAE, steer with its features, and write the trace into a run; or replay one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from trimtab.dictionaries import AnyModelConfig
from trimtab.dictionaries.meanings import name_features
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, DecodingConfig, LanguageModel
from trimtab.runs import LEFT_OUT_AT_DEFAULT, Meter, Run, part_of, read_typed
from trimtab.steering.doses import DEFAULT_DOSE
from trimtab.steering.result import SteerResult
from trimtab.steering.steered import SteeringPlan, SteerOptions, check_options, no_features, plan_steering, steered
from trimtab.steering.trace import Trace
from trimtab.steering.trace_replay import ReplayReport, replay


@dataclass(frozen=True, kw_only=True)
class SteerConfig(SteerOptions, DecodingConfig, AnyModelConfig):
    """Continue prompts, unsteered and with features added, clamped or removed; or replay such a run."""

    prompt: tuple[str, ...] = ()
    """Texts to continue."""
    feature_name: tuple[str, ...] = field(default=(), metadata=LEFT_OUT_AT_DEFAULT)
    """Features by what they mean (IO=Mary), where the SAE says it; beside those given by number."""
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


def run_steer(
    config: SteerConfig, *, load: Callable[[Path], LanguageModel | None] | None = None
) -> SteerResult | ReplayReport:
    """What `trimtab steer` does.

    A run that is done is not done again: its result is read back.

    Args:
        config: what to do.
        load: loads the model of a run to replay whose record alone does not say how; None leaves it to the record.

    Raises:
        UserError: something in the config is wrong, or does not fit the model, the dictionary or the run directory.
    """
    if config.replay is not None:
        for one in fields(config):  # the run holds its prompts, features and all
            if one.name != "replay" and getattr(config, one.name) != one.default:
                name = one.name if one.name == "prompt" else f"--{one.name.replace('_', '-')}"
                raise UserError(f"{name} with --replay", "a replay takes it from the run", "leave it out")
        with Meter(f"replaying {config.replay}") as meter:
            model = None if load is None else load(config.replay)
            return replay(config.replay, model=model, progress=meter.advance)
    options = SteerOptions(**part_of(config, SteerOptions))
    if not config.feature and not config.feature_name:
        raise no_features()
    check_options(options, len(config.prompt), config.decoding)
    model, dictionary = config.load()
    named = dictionary.features_named(config.feature_name)
    config = replace(config, feature=(*config.feature, *named), feature_name=())
    options = replace(options, feature=config.feature)
    plan = plan_steering(options, model, dictionary, config.prompt, config.decoding)
    config = replace(config, dose=config.dose or (DEFAULT_DOSE,))  # what a run records
    if config.run is None:
        return steered(plan, model)
    with Run.open(config.run, "steer", config, device=config.device, ignore_fields=("run", "any_model")) as run:
        run.record(hashes={"model": model.fingerprint, "dictionary": dictionary.fingerprint})
        name_features(run, model, dictionary, config.feature)
        return steered_in(run, plan, model)


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
