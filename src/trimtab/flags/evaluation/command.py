"""`trimtab flags evaluate`: runs of `flags train` side by side, from the original model to the end of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from trimtab.activations import read_documents, sample_text
from trimtab.dictionaries import load_dictionary
from trimtab.errors import UserError
from trimtab.flags.adapters import ADAPTER_FILE
from trimtab.flags.command import FlagTrainConfig, read_data
from trimtab.flags.concepts import read_concepts
from trimtab.flags.config import FlagTraining
from trimtab.flags.curricula import Curriculum
from trimtab.flags.data.checking import read_judge
from trimtab.flags.data.writing import COMMAND as WRITING
from trimtab.flags.dividing import Divided, example_id
from trimtab.flags.evaluation.control_judging import check_unseen
from trimtab.flags.evaluation.evaluated_runs import EvaluatedRun, State, check_alike, labels_of, settings_of
from trimtab.flags.evaluation.evaluating import COMMAND, MAY_CHANGE, TASK, Evaluator
from trimtab.flags.evaluation.options import FlagEvaluationOptions, without_judge
from trimtab.flags.evaluation.result import FlagEvaluation
from trimtab.flags.examples import Example, read_examples
from trimtab.flags.files import NAME, Snapshot, load_flagged, load_flags, snapshots
from trimtab.flags.training import COMMAND as TRAINING
from trimtab.lm import LanguageModel, load_model
from trimtab.runs import Run, SourceName, check_least, config_directory, read_record, read_typed, text_id
from trimtab.runs.record import RECORD_NAME

NOT_THE_RESULT = ("run", "trained", *MAY_CHANGE)
"""Fields that may change between openings of a run: what was measured stays, and further runs and parts join it."""
FIRST = {"heading": ""}
"""Metadata of options that stand at the top of the help."""


@dataclass(frozen=True, kw_only=True)
class FlagEvaluateConfig(FlagEvaluationOptions):
    """Show what finetunings with flags did: what flags say, what else says it, what is lost without, and the price."""

    trained: tuple[Path, ...] = ()
    """Runs of `flags train`: of each curriculum and seed that is to be compared."""
    data: tuple[Path, ...] = field(default=(), metadata=FIRST)
    """JSONL files of examples that no run was trained on; by default those that the runs held out."""
    snapshots: int = field(default=4, metadata=FIRST)
    """Snapshots of each run to measure, evenly chosen, the last among them; the original model comes on top."""
    text: tuple[SourceName, ...] = ()
    """Files, directories or hub:NAME[[:CONFIG]:SPLIT] of general text; by default a sample that ships with trimtab."""
    task: str = TASK
    """The unrelated task, one that needs no files, or none."""
    judge_data: Path | None = None
    """Labelled texts to fit a judge of concepts on (JSONL, as `trimtab flags import` makes it), or a judge that was
    saved (.npz), for control, which is left out without it. No text may be one of a run's."""
    sae: SourceName | None = None
    """Shipped SAE, or directory of an SAE in SAELens's layout, whose best feature is another way of control."""
    device: str = "cpu"
    """Where to compute."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after the rest. The same command resumes it, and runs that
    are added to it are measured alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trained:
            raise UserError(COMMAND, "there is no run to evaluate", "name a run of `flags train`")
        check_least(self, 1, "snapshots")
        if self.sae is not None and not self.compared:
            raise UserError("--sae", "no other way of control is compared", "give --compared a number of concepts")
        if "control" in self.part and self.judge_data is None:
            without_judge(self.part)

    def directory(self) -> Path:
        """Where the run goes: the same config always finds its own run."""
        return self.run or config_directory("flags-evaluate", self, ignore=("run", *MAY_CHANGE))


class RecordedRun(NamedTuple):
    """A run of `flags train` as its record says it."""

    path: Path
    label: str
    record: dict[str, Any]
    kept: list[Snapshot]

    @property
    def config(self) -> dict[str, Any]:
        return self.record["config"]

    @property
    def model(self) -> str:
        """What the original model is loaded by."""
        return str(self.config.get("model") or (self.record["results"] or {}).get("model"))

    @property
    def curriculum(self) -> str:
        known = self.record["results"] or {}
        return known["curriculum"] if known else Path(str(self.config["curriculum"])).stem

    @property
    def concepts(self) -> tuple[str, ...]:
        return load_flags(self.kept[-1].path).concepts


def run_flag_evaluate(config: FlagEvaluateConfig) -> FlagEvaluation:
    """Measure what is not measured yet, and compare.

    Raises:
        UserError: a run is not one of `flags train` or keeps no model; runs of different models, concepts,
            templates or data; too few examples have or lack a concept.
    """
    runs = [read_run(path, label) for path, label in zip(config.trained, labels_of(config.trained), strict=True)]
    check_same(runs, own_data=bool(config.data))
    notes: list[str] = []
    data = data_of_runs(config, runs, notes)
    examples = heldout_examples(config, runs, data)
    judge = None
    if "control" in config.part and config.judge_data is not None:
        judge = read_judge(config.judge_data, runs[0].concepts, config.seed)
        for label, own in data.items():
            check_unseen(judge, [*own.train, *own.heldout], label)
    original = load_model(runs[0].model, device=config.device, allow=runs[0].config.get("allow", ()))
    original.require("padding", *(("decode",) if {"price", "control"} & {*config.part} else ()))
    known = runs[0].record["hashes"].get("model", original.fingerprint)
    if original.fingerprint != known:
        why = f"{runs[0].label} was finetuned from weights of hash {known}, and these have {original.fingerprint}"
        raise UserError(f"model {runs[0].model}", why, "load the model that was finetuned")
    dictionary = None if config.sae is None else load_dictionary(config.sae, model=original, device=config.device)
    evaluated = [evaluated_run(one, data.get(one.label), original, config) for one in runs]
    check_alike(evaluated)
    with Run.open(
        config.directory(), COMMAND, config, seeds=[config.seed], device=config.device, ignore_fields=NOT_THE_RESULT
    ) as run:
        evaluator = Evaluator(
            original, evaluated, examples, config, run,
            texts=list(read_documents(config.text or [sample_text()])) if "price" in config.part else None,
            task=None if config.task == "none" else config.task, judge=judge, dictionary=dictionary,
            descriptions=descriptions_of(runs[0], notes) if {"reading", "control"} & {*config.part} else None,
            chat=bool(runs[0].config.get("chat")),
            max_tokens=max(int(one.config.get("max_tokens", FlagTraining.max_tokens)) for one in runs),
            labels_known=labels_known(config.data or runs[0].config.get("data") or (), notes),
        )  # fmt: skip
        evaluator.notes += notes
        return evaluator.finish()


def read_run(path: Path, label: str) -> RecordedRun:
    """A run of `flags train`.

    Raises:
        UserError: it is another command's, or keeps no model.
    """
    record = read_record(path)
    if record["command"] != TRAINING:
        why = f"it belongs to `{record['command']}`, not `{TRAINING}`"
        raise UserError(f"run {path}", why, "name a run of `flags train`")
    kept = snapshots(path)
    if not kept:
        raise UserError(f"run {path}", "it keeps no model yet", "let it finish, or train with --snapshots")
    return RecordedRun(path, label, record, kept)


def check_same(runs: Sequence[RecordedRun], *, own_data: bool) -> None:
    """Raise a `UserError` unless runs are of one model and template, and held out the same examples.

    Args:
        runs: to compare.
        own_data: whether examples are given that no run knows.
    """
    first = runs[0]
    for other in runs[1:]:
        facts = [
            ("its model", first.model, other.model),
            ("its model's hash", first.record["hashes"].get("model"), other.record["hashes"].get("model")),
            ("chat", bool(first.config.get("chat")), bool(other.config.get("chat"))),
        ]
        if not own_data:
            facts.append(("its data's hash", first.record["hashes"].get("data"), other.record["hashes"].get("data")))
        for name, one, two in facts:
            if one != two:
                hint = "give examples that no run was trained on as --data" if "data" in name else "evaluate it alone"
                raise UserError(f"run {other.label}", f"{name} is {two}, and that of {first.label} {one}", hint)


def data_of_runs(config: FlagEvaluateConfig, runs: Sequence[RecordedRun], notes: list[str]) -> dict[str, Divided]:
    """The examples of runs, by label; a note for each that does not know its own any more.

    Raises:
        UserError: the same, where the runs' own examples are those to evaluate on.
    """
    found: dict[str, Divided] = {}
    for run in runs if config.data else runs[:1]:
        try:
            found[run.label] = data_of(run)
        except UserError as error:
            if not config.data:
                raise UserError(error.what, error.why, "give examples that it was not trained on as --data") from error
            notes.append(f"the examples that {run.label} was trained on are not known: {error.line}")
    return found if config.data else dict.fromkeys((run.label for run in runs), found[runs[0].label])


def data_of(run: RecordedRun) -> Divided:
    """The examples of a run. Raises a `UserError` if it does not know them any more."""
    if not run.config.get("data"):
        raise UserError(f"run {run.path}", "it was made in Python and does not know its examples")
    data = read_data(read_typed(FlagTrainConfig, run.config, f"run {run.path}"), run.concepts)
    if data.hash != run.record["hashes"].get("data"):
        raise UserError(f"run {run.path}", "its files of examples are not what they were when it was trained")
    return data


def heldout_examples(
    config: FlagEvaluateConfig, runs: Sequence[RecordedRun], data: Mapping[str, Divided]
) -> list[Example]:
    """The examples to evaluate on: those given, or those that the runs held out.

    Raises:
        UserError: there are none, or one was trained on.
    """
    if not config.data:
        if not data[runs[0].label].heldout:
            raise UserError(f"run {runs[0].path}", "it held out no example", "give some as --data")
        return data[runs[0].label].heldout
    given = [example for path in config.data for example in read_examples(path, runs[0].concepts)]
    for label, own in data.items():
        trained = {example_id(example) for example in own.train}
        for example in given:
            if example_id(example) in trained:
                why = f"{label} was trained on it"
                raise UserError(f"example {example.prompt[:40]!r}", why, "give others, or leave out --data")
    return given


def descriptions_of(run: RecordedRun, notes: list[str]) -> Mapping[str, str] | None:
    """What each concept is in words; None, and a note, if the file is not there any more."""
    try:
        return read_concepts(str(run.config.get("concepts")))
    except UserError:
        notes.append("concepts are described by their names alone, as their file is not there any more")
        return None


def labels_known(paths: Sequence[Path | str], notes: list[str]) -> bool:
    """Whether labels of examples say how good a judge is: not where a model wrote what a judge or rule let pass."""
    for path in paths:
        directory = Path(path).parent
        if (directory / RECORD_NAME).is_file() and read_record(directory)["command"] == WRITING:
            notes.append(f"what a judge is worth on {path} is not known, as a judge or rule chose its labels")
            return False
    return True


def evaluated_run(
    run: RecordedRun, data: Divided | None, original: LanguageModel, config: FlagEvaluateConfig
) -> EvaluatedRun:
    """A run's models to measure: so many of its snapshots, evenly chosen, the last among them."""
    kept = list({one.step: one for one in run.kept}.values())
    places = np.linspace(len(kept) - 1, 0, min(config.snapshots, len(kept))).round().astype(int)
    states = [
        State(
            step=one.step,
            tokens=one.tokens,
            identity=text_id((one.path / NAME).read_text(encoding="utf-8")),
            load=partial(_loaded, one.path, original, config.device),
        )
        for one in (kept[place] for place in sorted(set(places.tolist())))
    ]
    return EvaluatedRun(
        label=run.label,
        curriculum=run.curriculum,
        seed=int((run.record["seeds"] or [0])[0]),
        flags=load_flags(run.kept[-1].path),
        states=tuple(states),
        last_phase=_last_phase(run.config),
        settings=settings_of(run.config, run.record["hashes"].get("data")),
        examples=tuple(data.train) if data else (),
    )


def _last_phase(config: Mapping[str, Any]) -> int:
    """The step at which the last phase of a curriculum begins; the last step where its file is not there any more."""
    given = config["curriculum"]
    try:
        found = Curriculum.named(given) if isinstance(given, str) else read_typed(Curriculum, given, "a curriculum")
    except UserError:
        return int(config["steps"])
    ends = [0.0, *(phase.until for phase in found.phases)]
    return math.ceil(round(ends[-2] * config["steps"], 6))


def _loaded(path: Path, original: LanguageModel, device: str) -> LanguageModel:
    """A model as snapshots are kept: where all weights were trained, the last one is rounded to bfloat16 as well."""
    model = load_flagged(path, device=device, base=original)[0]
    if not (path / ADAPTER_FILE).is_file():
        with torch.no_grad():
            for weight in model.hf.parameters():
                weight.copy_(weight.bfloat16())
    return model
