"""`trimtab flags train`: from a model's name, a list of concepts and labelled examples to a model with flags."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.distributed import Ranks
from trimtab.errors import UserError
from trimtab.flags.concepts import read_concepts
from trimtab.flags.config import FlagPlacing, FlagTraining
from trimtab.flags.curricula import Curriculum
from trimtab.flags.dividing import Divided, divide, example_id
from trimtab.flags.examples import Example, read_examples
from trimtab.flags.files import MODEL, snapshots
from trimtab.flags.placing import place_flags
from trimtab.flags.result import FlagTrainingResult
from trimtab.flags.spec import FlagSpec
from trimtab.flags.training import COMMAND, NOT_THE_RESULT, FlagJob, finetune
from trimtab.lm.config import ModelConfig
from trimtab.runs import Run, config_dict, config_directory, json_safe, read_typed, text_id
from trimtab.runs.results import Result
from trimtab.runs.tables import Table

NOT_THE_CONFIG = (*NOT_THE_RESULT, "run")
FIRST = {"heading": ""}
"""Metadata of options that stand at the top of the help."""


@dataclass(frozen=True, kw_only=True)
class FlagTrainConfig(FlagPlacing, FlagTraining, ModelConfig):
    """Finetune a model so that some of its residual dimensions say, and decide, which concepts it writes about."""

    concepts: Path = field(metadata=FIRST)
    """Text or JSON file that lists the concepts."""
    data: tuple[Path, ...] = field(metadata=FIRST)
    """JSONL files of examples: prompt, response, concepts."""
    curriculum: str = field(default="forced", metadata=FIRST)
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
class FlagTrainRun(Result):
    """What `trimtab flags train` prints."""

    run: Path
    result: FlagTrainingResult
    model_bytes: int
    """Of the files of the model, or of the adapter."""
    snapshots: int
    """Models that the run holds, the result among them."""
    resumed: bool
    """Whether the run was done before."""

    def headline(self) -> str:
        what = "adapter" if self.result.adapt == "lora" else "model"
        kept = f"; {self.snapshots} snapshots" if self.snapshots > 1 else ""
        done = " (done before)" if self.resumed else ""
        where = f"{what} of {self.model_bytes / 1e6:.1f} MB in {self.run / MODEL}{kept}{done}"
        return f"{self.result.headline()}; {where}"

    def tables(self) -> dict[str, Table]:
        return self.result.tables()

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain values."""
        about = {"run": str(self.run), "model_bytes": self.model_bytes, "snapshots": self.snapshots}
        return {**json_safe(self.result), **about, "resumed": self.resumed}


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
        run = _open(config) if ranks.is_first else None
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
            return FlagTrainRun(
                run=run.path,
                result=read_typed(FlagTrainingResult, run.results, f"run {run.path}"),
                model_bytes=sum(file.stat().st_size for file in files),
                snapshots=len(snapshots(run.path)),
                resumed=resumed,
            )


def _open(config: FlagTrainConfig) -> Run:
    return Run.open(
        config.directory(), COMMAND, config, seeds=[config.seed], device=config.device, ignore_fields=NOT_THE_CONFIG
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
    """Flags as the run placed them before, or placed now, on responses in an order that mixes them."""
    known = run.record_dict.get("flags")
    if known is not None:
        return read_typed(FlagSpec, known, f"run {run.path}, flags")
    texts = [example.response for example in sorted(data.train, key=example_id)]
    flags = place_flags(
        model, concepts, texts, dims=dims, from_layer=config.from_layer, ramp=config.ramp, ramp_scale=config.ramp_scale
    )
    run.record(flags=json_safe(flags))
    return flags
