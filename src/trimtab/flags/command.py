"""`trimtab flags train`: from a model's name, a list of concepts and labelled examples to a model with flags; and
`trimtab flags steer`: prompts continued with its flags free, and as switches set them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.distributed import Ranks
from trimtab.errors import UserError, did_you_mean
from trimtab.flags.concepts import read_concepts
from trimtab.flags.config import FlagPlacing, FlagTraining
from trimtab.flags.curricula import Curriculum
from trimtab.flags.dividing import Divided, divide
from trimtab.flags.examples import Example, read_examples
from trimtab.flags.files import MODEL, NAME, found_directory, load_flagged, load_flags, snapshots, was_trained_in_chat
from trimtab.flags.placing import place_flags
from trimtab.flags.result import FlagTrainingResult
from trimtab.flags.spec import FlagSpec
from trimtab.flags.switches import FlagSource, Switch
from trimtab.flags.training import COMMAND as TRAINING
from trimtab.flags.training import NOT_THE_RESULT, FlagJob, finetune
from trimtab.lm import DecodingConfig, LanguageModel
from trimtab.lm.config import ModelConfig
from trimtab.runs import (
    LEFT_OUT_AT_DEFAULT,
    Run,
    SourceName,
    config_dict,
    config_directory,
    json_safe,
    path_of_run,
    read_record,
    read_typed,
    shipped_names,
    text_id,
)
from trimtab.runs.record import RECORD_NAME
from trimtab.steering import SteerOptions, SteerResult
from trimtab.steering.command import steered_in
from trimtab.steering.planning import check_options, plan_steering
from trimtab.steering.steered import steered

STEERING = "flags steer"
NOT_THE_CONFIG = (*NOT_THE_RESULT, "run")
FIRST = {"heading": ""}
"""Metadata of options that stand at the top of the help."""


@dataclass(frozen=True, kw_only=True)
class FlagTrainConfig(FlagPlacing, FlagTraining, ModelConfig):
    """Finetune a model so that some of its residual dimensions say, and decide, which concepts it writes about."""

    needs = ("padding", "resid_mid", "resid_post")

    concepts: Path = field(metadata=FIRST)
    """File of the concepts: `name: description` in each line."""
    data: tuple[Path, ...] = field(metadata=FIRST)
    """JSONL files of examples: prompt, response, concepts."""
    curriculum: SourceName = field(default="forced", metadata=FIRST)
    """plain, auxiliary or forced; or a JSON file of phases, each with until, forced and weight."""
    heldout: tuple[Path, ...] = field(default=(), metadata=FIRST)
    """JSONL files of examples to measure on, in place of a share of the data."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after the rest. The same command resumes it."""

    def __post_init__(self) -> None:
        FlagPlacing.__post_init__(self)
        FlagTraining.__post_init__(self)
        if self.dtype != "float32":
            why = "weights are trained in float32"
            raise UserError(f"dtype {self.dtype}", why, "leave it out; --autocast computes products in bfloat16")
        if not self.data:
            raise UserError("data", "no file is given", "give JSONL files of examples")

    def directory(self) -> Path:
        """Where the run goes: the same config always finds its own run."""
        return self.run or config_directory("flags", self, ignore=NOT_THE_CONFIG)


@dataclass(frozen=True, kw_only=True, repr=False)
class FlagTrainRun(FlagTrainingResult):
    """What `trimtab flags train` prints."""

    run: Path
    model_bytes: int
    """Of the files of the model, or of the adapter."""
    snapshots: int
    """Models that the run holds, the result among them."""
    resumed: bool
    """Whether the run was done before."""

    def headline(self) -> str:
        what = "adapter" if self.adapt == "lora" else "model"
        kept = f"; {self.snapshots} snapshots" if self.snapshots > 1 else ""
        done = " (done before)" if self.resumed else ""
        where = f"{what} of {self.model_bytes / 1e6:.1f} MB in {self.run / MODEL}{kept}{done}"
        return f"{super().headline()}; {where}"


def run_flag_train(config: FlagTrainConfig) -> FlagTrainRun | None:
    """Place flags and finetune; under torchrun together with the other processes.

    Files and options are checked before the model is loaded. A run that is done is read back without it.

    Returns:
        What it came to; None in all processes but the first.

    Raises:
        UserError: anything that the user named is wrong; see `read_concepts`, `read_examples`, `place_flags` and
            `train_flags`.
    """
    with Ranks.from_environment() as ranks:
        concepts = tuple(read_concepts(config.concepts))
        dims = config.dims_of(concepts)
        curriculum = Curriculum.named(config.curriculum)
        data = read_data(config, concepts)
        about = {"seeds": [config.seed], "device": config.device, "ignore_fields": NOT_THE_CONFIG}
        run = Run.open(config.directory(), TRAINING, config, **about) if ranks.is_first else None
        with run or nullcontext():
            if run is not None:
                hashes = {"data": data.hash, "concepts": text_id(json.dumps(concepts))}
                run.record(hashes={**hashes, "curriculum": text_id(json.dumps(config_dict(curriculum)))})
            resumed = ranks.broadcast(run is not None and run.done)
            if not resumed:
                model = config.load_model(ranks.device(config.device))
                job = FlagJob(
                    model=model,
                    flags=ranks.broadcast(None if run is None else _placed(config, run, model, concepts, dims, data)),
                    data=data,
                    curriculum=curriculum,
                    curriculum_name=Path(config.curriculum).stem,
                    config=config,
                )
                finetune(job, run, kept=True, ranks=ranks)
            if run is None:
                return None
            files = [file for file in run.file(MODEL).rglob("*") if file.is_file()]
            result = read_typed(FlagTrainingResult, run.results, f"run {run.path}")
            return FlagTrainRun(
                **vars(result),
                run=run.path,
                model_bytes=sum(file.stat().st_size for file in files),
                snapshots=len(snapshots(run.path)),
                resumed=resumed,
            )


def read_data(config: FlagTrainConfig, concepts: Sequence[str]) -> Divided:
    """All examples, those held out apart."""

    def read(paths: Sequence[Path]) -> list[Example]:
        return [example for path in paths for example in read_examples(path, concepts)]

    heldout = read(config.heldout) if config.heldout else None
    return divide(read(config.data), heldout, config.holdout, concepts)


def _placed(
    config: FlagTrainConfig, run: Run, model: Any, concepts: Sequence[str], dims: Any, data: Divided
) -> FlagSpec:
    """Flags as the run placed them before, or placed now."""
    known = run.record_dict.get("flags")
    if known is not None:
        return read_typed(FlagSpec, known, f"run {run.path}, flags")
    flags = place_flags(
        model, concepts, data.train, dims=dims, from_layer=config.from_layer, ramp=config.ramp,
        ramp_scale=config.ramp_scale, chat=config.chat, max_tokens=config.max_tokens,
    )  # fmt: skip
    run.record(flags=json_safe(flags))
    return flags


@dataclass(frozen=True, kw_only=True)
class FlagSteerConfig(DecodingConfig):
    """Continue prompts with a model's flags free, and with some of them on, off or at a strength between."""

    model: SourceName
    """Directory of a model with flags, a finished run of `flags train`, or the shipped adapter's name."""
    prompt: tuple[str, ...] = ()
    """Texts to continue."""
    on: tuple[str, ...] = ()
    """Concepts to switch on."""
    off: tuple[str, ...] = ()
    """Concepts to switch off."""
    strength: tuple[str, ...] = ()
    """Concepts at a strength, NAME=NUMBER: 0 is off, 1 is on."""
    positions: str = "all"
    """Input positions whose flags are set: all, as in training, or as for `trimtab steer`."""
    chat: bool | None = None
    """Put each prompt into the model's chat template, as one user turn; as in its finetuning if this is not given."""
    samples: int = 1
    """Continuations per prompt; more than one needs a temperature."""
    stop: tuple[str, ...] = ()
    """End a text that contains one of these."""
    kl: bool = True
    """Measure the switches' effect on the next-token distribution; takes one more pass over the texts."""
    run: Path | None = None
    """Directory to write the trace to."""
    dtype: str = field(default="float32", metadata={"heading": "model"})
    """What the model computes in."""
    device: str = field(default="cpu", metadata={"heading": "model"})
    """Where to compute."""
    allow: tuple[str, ...] = field(default=(), metadata={"heading": "model", **LEFT_OUT_AT_DEFAULT})
    """Use these although the model's check of itself finds a difference there (decode, resid_mid)."""


def run_flag_steer(config: FlagSteerConfig) -> SteerResult:
    """What `trimtab flags steer` does: the result, trace and page of `trimtab steer`, which replays it.

    Raises:
        UserError: there is no such model or run, it has no such concept, or something in the config is not allowed.
    """
    directory = flagged_directory(config.model)
    chat = was_trained_in_chat(directory) if config.chat is None else config.chat
    options = SteerOptions(chat=chat, samples=config.samples, kl=config.kl)
    decoding = config.decode_config(stop=config.stop)
    check_options(options, len(config.prompt), decoding)
    flags = load_flags(directory)
    source = FlagSource(flags, switches_of(config, flags), positions=config.positions)
    model, flags = load_flagged(directory, device=config.device, dtype=config.dtype, allow=config.allow)
    model.require("decode")
    plan = plan_steering(options, model, source, config.prompt, decoding)
    if config.run is None:
        return steered(plan, model)
    kept = replace(config, model=str(directory), chat=chat)  # what a replay loads
    with Run.open(config.run, STEERING, kept, device=config.device, ignore_fields=("run",)) as run:
        run.record(hashes={"model": model.fingerprint}, axes={"width": flags.d_model, "dims": source.dims})
        return steered_in(run, plan, model)


def flagged_directory(given: str | Path) -> Path:
    """Where the files of a model with flags are.

    Args:
        given: their directory, a finished run of `flags train`, or the name of an adapter that ships with trimtab.

    Raises:
        UserError: it is none of these.
    """
    path = found_directory(Path(given).expanduser())
    if (path / NAME).exists():
        return path
    if not (path / RECORD_NAME).exists():
        hint = f"give a run of `{TRAINING}`, or a directory with {NAME}, such as one that save_flags wrote"
        hint = did_you_mean(str(given), shipped_names(NAME), hint)
        raise UserError(f"model {given}", f"there is no {NAME} in it" if path.is_dir() else "there is none", hint)
    record = read_record(path)
    if record["command"] != TRAINING:
        raise UserError(f"run {given}", f"it belongs to `{record['command']}`", f"give a run of `{TRAINING}`")
    if record["status"] != "done":
        raise UserError(f"run {given}", "its finetuning has not finished", f"run the same `{TRAINING}` again")
    return path / MODEL


def switches_of(config: FlagSteerConfig, flags: FlagSpec) -> dict[str, Switch]:
    """What the options say of each concept.

    Raises:
        UserError: a concept is unknown or set twice, a strength is none, or nothing is set.
    """
    found: dict[str, Switch] = {}
    on, off = dict.fromkeys(config.on, True), dict.fromkeys(config.off, False)
    for name, switch in [*on.items(), *off.items(), *_strengths(config.strength)]:
        flags.index(name)
        if name in found:
            raise UserError(f"concept {name!r}", "it is set twice", "give it to one of --on, --off and --strength")
        found[name] = switch
    if not found:
        raise UserError("the switches", "all flags are free", f"set one, such as --on {flags.concepts[0]!r}")
    return found


def _strengths(texts: Sequence[str]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            found.append((name, float(number)))
        except ValueError:
            name = ""
        if not name:
            raise UserError(f"strength {text!r}", "it is not NAME=NUMBER", "write it like sea=0.5")
    return found


def model_of_run(run: Path) -> LanguageModel | None:
    """The model of a run of `flags steer`, which may be an adapter; None for a run of another command."""
    record = read_record(run)
    if record["command"] != STEERING:
        return None
    config = record["config"]
    how = {"device": config["device"], "dtype": config["dtype"], "allow": config.get("allow", ())}
    return load_flagged(path_of_run(record, config["model"]), **how)[0]
