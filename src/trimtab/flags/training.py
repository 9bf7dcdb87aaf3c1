"""Finetuning of a model with flags (arXiv 2602.07828): all weights or an adapter, with exact resume."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.distributed import Ranks
from trimtab.errors import UserError
from trimtab.flags.adapters import add_adapter, check_lora, has_adapter, load_adapter
from trimtab.flags.config import FlagTraining
from trimtab.flags.curricula import CURRICULA, Curriculum
from trimtab.flags.dividing import Divided, divide
from trimtab.flags.examples import Example, encode
from trimtab.flags.files import MODEL, load_flags
from trimtab.flags.finetuning import CHECKPOINTS, FlagTrainer, Subject
from trimtab.flags.measuring import measure_flags
from trimtab.flags.result import FlagTrainingResult, TrainedFlags
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, load_model
from trimtab.lm.loading import DTYPES
from trimtab.lm.model import check_is_model
from trimtab.runs import (
    Run,
    config_dict,
    field_types,
    json_safe,
    kept_or_temporary,
    read_keywords,
    read_metrics,
    read_typed,
)
from trimtab.runs.shown import write_shown
from trimtab.training.checkpoint import discard_checkpoints

COMMAND = "flags train"
NOT_THE_RESULT = ("checkpoint_every",)
"""Fields that may change between openings of a run."""


@dataclass(frozen=True, kw_only=True)
class FlagJob:
    """All that a finetuning is made from.

    Raises:
        UserError: flags do not fit the model, or the model is not one whose weights can be trained.
    """

    model: LanguageModel
    flags: FlagSpec
    data: Divided
    curriculum: Curriculum
    curriculum_name: str
    config: FlagTraining

    def __post_init__(self) -> None:
        model = self.model
        self.flags.check_fits(model.layout, model.d_model, model.name)
        if model.dtype != torch.float32:
            why = f"it is in {str(model.dtype).removeprefix('torch.')}, which loses small steps"
            hint = 'load it with dtype="float32"; autocast=True computes products in bfloat16'
            raise UserError(f"finetuning {model.name}", why, hint)
        if has_adapter(model.hf):
            why, hint = "it has an adapter of PEFT already", "merge that first (merge_and_unload)"
            raise UserError(f"finetuning {model.name}", why, hint)
        if self.config.adapt == "lora":
            check_lora(model, self.flags, self.config)

    @property
    def name(self) -> str:
        """Of the curriculum: a known one's, or `own`."""
        return next((known for known, one in CURRICULA.items() if one == self.curriculum), self.curriculum_name)


def train_flags(
    model: LanguageModel,
    flags: FlagSpec,
    examples: Sequence[Example],
    *,
    curriculum: str | Curriculum = "forced",
    heldout: Sequence[Example] | None = None,
    run: Path | str | None = None,
    **options: Any,
) -> TrainedFlags:
    """Finetune a copy of a model so that its flags say, and decide, what it writes.

    Args:
        model: the model, in float32; it stays as it is.
        flags: where its flags go, as `place_flags` chooses.
        examples: responses labelled with the concepts that they need.
        curriculum: `plain`, `auxiliary`, `forced`, a JSON file of phases, or one of your own.
        heldout: examples that the result is measured on; by default those of a share (`holdout`) of the prompts and
            documents, as `divide` says, or where that leaves none, those trained on.
        run: directory that keeps metrics, checkpoints, snapshots and the model; the same call again goes on from there,
            to the same bits at equal device, threads and versions.
        options: fields of `FlagTraining`.

    Returns:
        The model with flags, and what they say of held-out responses before and after.

    Raises:
        UserError: a value is not allowed, flags do not fit the model, a concept that too few examples have or lack,
            LoRA that does not reach the flags, a loss that is not finite (good checkpoints stay), or a run of other
            settings.
    """
    check_is_model(model)
    config = FlagTraining(**read_keywords(options, field_types(FlagTraining), train_flags))
    if config.snapshots and run is None:
        raise UserError(f"snapshots {config.snapshots}", "they are kept in a run's directory", "give run")
    if not isinstance(flags, FlagSpec):
        raise UserError(f"flags {flags!r}", "they are no FlagSpec", "give what place_flags or load_flags returns")
    job = FlagJob(
        model=model,
        flags=flags,
        data=divide(examples, heldout, config.holdout, flags.concepts),
        curriculum=Curriculum.named(curriculum),
        curriculum_name=Path(curriculum).stem if isinstance(curriculum, str) else "own",
        config=config,
    )
    described = {"curriculum": config_dict(job.curriculum), **config_dict(config), "flags": json_safe(flags)}
    with kept_or_temporary(run) as path:
        about: dict[str, Any] = {"seeds": [config.seed], "device": str(model.device), "ignore_fields": NOT_THE_RESULT}
        with Run.open(path, COMMAND, described, **about) as opened:
            opened.record(hashes={"data": job.data.hash})
            trained = finetune(job, opened, kept=run is not None, ranks=Ranks())
            assert trained is not None
            return trained


def finetune(job: FlagJob, run: Run | None, *, kept: bool, ranks: Ranks) -> TrainedFlags | None:
    """Finetune in an open run, or read back what it came to.

    Args:
        job: what to do.
        run: the run; None in all processes but the first.
        kept: whether the run's directory stays.
        ranks: the processes that do it together.

    Returns:
        The model; None in all processes but the first.

    Raises:
        UserError: see `train_flags`; or a batch with fewer examples than there are processes.
    """
    model, config = job.model, job.config
    if config.batch_size < ranks.size:
        raise UserError(f"batch_size {config.batch_size}", f"there are {ranks.size} processes", "raise it")
    tokens = encode(model, job.data.train, chat=config.chat, max_tokens=config.max_tokens)
    encode(model, job.data.heldout, chat=config.chat, max_tokens=config.max_tokens)  # refused before it is trained
    if run is not None:
        run.record(hashes={"model": model.fingerprint})
    resumed = ranks.broadcast(run is not None and run.done)
    if resumed:
        return None if run is None else _read_back(job, run)
    if config.adapt == "lora":
        tuned, adapter = add_adapter(model, job.flags, config, config.seed)
    else:
        tuned = LanguageModel.from_hf(copy.deepcopy(model.hf), model.tokenizer, f"{model.name} with flags", model.allow)
        adapter = None
    subject = Subject(model=tuned, flags=job.flags, adapter=adapter)
    training = FlagTrainer(subject, job.curriculum, config, job.data.train, tokens, run, kept=kept, ranks=ranks)
    training.run_to_end()
    if run is None:
        return None
    dtype = DTYPES[config.save_dtype]
    training.round_weights(dtype)
    before, after = (
        measure_flags(
            each, job.flags, job.data.heldout or job.data.train, chat=config.chat, max_tokens=config.max_tokens,
            batch_size=config.batch_size, loss=config.loss, seed=config.seed,
        )
        for each in (model, tuned)
    )  # fmt: skip
    result = FlagTrainingResult(
        model=model.name,
        curriculum=job.name,
        adapt=config.adapt,
        trained_weights=sum(weight.numel() for weight in training.weights.values()),
        steps=config.steps,
        forced_steps=training.forced_steps,
        tokens=training.tokens,
        seed=config.seed,
        examples=len(job.data.train),
        left_out=job.data.left_out,
        measured_on=job.data.measured_on,
        chat=config.chat,
        before=before,
        after=after,
    )
    metrics = read_metrics(run.path)
    if kept:
        subject.save(run.file(MODEL), result, dtype)
        write_shown(run, [result.shown(metrics)])
    run.finish(result)
    discard_checkpoints(run.file(CHECKPOINTS))
    return TrainedFlags(
        result=read_typed(FlagTrainingResult, run.results, f"run {run.path}"),
        model=tuned,
        flags=job.flags,
        config=config,
        data=job.data.hash,
        metrics=metrics,
        run=run.path if kept else None,
        adapter=adapter,
    )


def _read_back(job: FlagJob, run: Run) -> TrainedFlags:
    """What a run that is done came to."""
    path, adapter = run.file(MODEL), None
    if job.config.adapt == "lora":
        hf = copy.deepcopy(job.model.hf)
        base = LanguageModel.from_hf(hf, job.model.tokenizer, job.model.name, job.model.allow)
        tuned, adapter = load_adapter(base, path)
    else:
        tuned = load_model(str(path), device=job.model.device, allow=job.model.allow)
    load_flags(path, tuned)
    return TrainedFlags(
        result=read_typed(FlagTrainingResult, run.results, f"run {run.path}"),
        model=tuned,
        flags=job.flags,
        config=job.config,
        data=job.data.hash,
        metrics=read_metrics(run.path),
        run=run.path,
        resumed=True,
        adapter=adapter,
    )
