"""Full finetuning of a model with flags (arXiv 2602.07828), with exact resume.

A step is forced, and then its loss is the cross-entropy of the responses, or it adds λ times the flags' loss; the
curriculum says which and how much. Batches and forced steps depend on seed and step alone, so that a checkpoint needs
no random state. Dropout stays off.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.flags.config import FlagTraining
from trimtab.flags.curricula import CURRICULA, Curriculum
from trimtab.flags.examples import Encoded, Example, LabelledBatch, batch_of, check_learnable, check_names, encode
from trimtab.flags.files import load_flags, save_flags
from trimtab.flags.loss import FlagReading, forcing, response_loss
from trimtab.flags.measuring import measure_encoded, strengths_right
from trimtab.flags.result import FlagTrainingResult, TrainedFlags
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, load_model
from trimtab.lm.model import check_is_model
from trimtab.runs import (
    Meter,
    Run,
    config_dict,
    field_types,
    json_safe,
    kept_or_temporary,
    read_keywords,
    read_metrics,
    read_typed,
    split_ids,
    text_id,
)
from trimtab.training.checkpoint import (
    Checkpoint,
    discard_checkpoints,
    latest_checkpoint,
    withdraw_checkpoint,
    write_checkpoint,
)
from trimtab.training.optimiser import Adam

COMMAND = "flags train"
CHECKPOINTS, MODEL = "checkpoints", "model"
"""Directories of a run: what it goes on from, and the model with flags."""
BETAS = (0.9, 0.999)
ORDER_STREAM = 32
"""Of the draws that order the examples of an epoch."""


NOT_THE_RESULT = ("checkpoint_every",)
"""Fields that may change between openings of a run."""


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
    """Finetune all weights of a copy of a model so that its flags say, and decide, what it writes.

    Args:
        model: the model, in float32; it stays as it is.
        flags: where its flags go, as `place_flags` chooses.
        examples: responses labelled with the concepts that they need.
        curriculum: `plain`, `auxiliary`, `forced`, or one of your own.
        heldout: examples that the result is measured on; by default a share (`holdout`) of `examples`, or where that
            leaves none, those trained on.
        run: directory that keeps metrics, checkpoints and the model; the same call again goes on from there, to the
            same bits at equal device, threads and versions.
        options: fields of `FlagTraining`.

    Returns:
        The model with flags, and what they say of held-out responses before and after.

    Raises:
        UserError: a value is not allowed, flags do not fit the model, a concept that too few examples have or lack, a
            loss that is not finite (good checkpoints stay), or a run of other settings.
    """
    check_is_model(model)
    config = FlagTraining(**read_keywords(options, field_types(FlagTraining), train_flags))
    schedule = Curriculum.named(curriculum)
    if not isinstance(flags, FlagSpec):
        raise UserError(f"flags {flags!r}", "they are no FlagSpec", "give what place_flags or load_flags returns")
    flags.check_fits(model.layout, model.d_model, model.name)
    if model.dtype != torch.float32:
        why = f"it is in {str(model.dtype).removeprefix('torch.')}, which loses small steps"
        raise UserError(f"finetuning {model.name}", why, 'load it with dtype="float32"')
    trained_on, measured_on = _divide(examples, heldout, config.holdout)
    check_learnable(trained_on, flags.concepts)
    for example in measured_on:
        check_names(example, flags.concepts)
    tokens, heldout_tokens = (
        encode(model, part, chat=config.chat, max_tokens=config.max_tokens) for part in (trained_on, measured_on)
    )
    described = {"curriculum": config_dict(schedule), **config_dict(config), "flags": json_safe(flags)}
    with (
        kept_or_temporary(run) as path,
        Run.open(
            path, COMMAND, described, seeds=[config.seed], device=str(model.device), ignore_fields=NOT_THE_RESULT
        ) as opened,
    ):
        opened.record(hashes={"model": model.fingerprint, "data": _data_hash(trained_on, measured_on)})
        resumed = opened.done
        if resumed:
            tuned = load_model(str(path / MODEL), device=model.device)
            load_flags(path / MODEL, tuned)
        else:
            tuned = LanguageModel.from_hf(copy.deepcopy(model.hf), model.tokenizer, f"{model.name} with flags")
            training = _Finetuning(tuned, flags, schedule, config, trained_on, tokens, opened, kept=run is not None)
            training.run_to_end()
            measured = (measured_on, heldout_tokens) if measured_on else (trained_on, tokens)
            before, after = (
                measure_encoded(each, flags, *measured, config.batch_size, config.loss, config.seed)
                for each in (model, tuned)
            )
            name = curriculum if isinstance(curriculum, str) else "own"
            result = FlagTrainingResult(
                curriculum=next((known for known, one in CURRICULA.items() if one == schedule), name),
                steps=config.steps,
                forced_steps=training.forced_steps,
                seed=config.seed,
                examples=len(trained_on),
                heldout=bool(measured_on),
                before=before,
                after=after,
            )
            if run is not None:
                _save_anew(tuned, flags, path / MODEL, result)
            opened.finish(result)
            discard_checkpoints(opened.file(CHECKPOINTS))
        return TrainedFlags(
            result=read_typed(FlagTrainingResult, opened.results, f"run {path}"),
            model=tuned,
            flags=flags,
            metrics=read_metrics(path),
            run=None if run is None else path,
            resumed=resumed,
        )


def _divide(
    examples: Sequence[Example], heldout: Sequence[Example] | None, share: float
) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to measure on; the same text is never in both."""
    for given in (examples, heldout or ()):
        for i, example in enumerate(given):
            if not isinstance(example, Example):
                hint = "give trimtab.flags.Example(prompt=…, response=…, concepts=[…])"
                raise UserError(f"example {i}", f"it is a {type(example).__name__}, not an Example", hint)
    ids = [_example_id(example) for example in examples]
    if heldout is not None:
        for example in heldout:
            if _example_id(example) in ids:
                why = "it is among those trained on, too"
                raise UserError(f"held-out example {example.prompt[:40]!r}", why, "leave it out of one of the two")
        return list(examples), list(heldout)
    parts = split_ids(dict.fromkeys(ids), {"train": 1 - share, "heldout": share}, "flags")
    kept = set(parts["train"])
    train = [example for example, id_ in zip(examples, ids, strict=True) if id_ in kept]
    return train, [example for example, id_ in zip(examples, ids, strict=True) if id_ not in kept]


def _example_id(example: Example) -> str:
    return text_id(f"{example.prompt}\0{example.response}")


def _data_hash(*parts: Sequence[Example]) -> str:
    said = [[[_example_id(example), *example.concepts] for example in part] for part in parts]
    return text_id(json.dumps(said))


def _save_anew(model: LanguageModel, flags: FlagSpec, path: Path, about: FlagTrainingResult) -> None:
    """Save in a run, where a kill may have left a model of the same bits."""
    shutil.rmtree(path, ignore_errors=True)
    save_flags(model, flags, path, about)


class StepLoss(NamedTuple):
    """What one step gives."""

    total: Tensor
    cross_entropy: Tensor
    reading: FlagReading | None
    """None where flags were forced."""


def step_loss(
    model: LanguageModel, flags: FlagSpec, batch: LabelledBatch, *, forced: bool, weight: float, form: str
) -> StepLoss:
    """The loss of a step: the mean cross-entropy of the responses' tokens, plus λ · the flags' loss unless forced.

    Args:
        model: the model.
        flags: its flags.
        batch: examples.
        forced: write the right values into the flags everywhere.
        weight: λ; at 0 flags are read without gradients.
        form: of the flags' loss.
    """
    if forced:
        with forcing(model, flags, batch.labels):
            loss = response_loss(model, batch).mean()
        return StepLoss(loss, loss, None)
    reading = FlagReading(flags, batch, form, gradients=weight > 0)
    with reading.reading(model):
        loss = response_loss(model, batch).mean()
    return StepLoss(loss + weight * reading.loss if weight else loss, loss, reading)


class _Finetuning:
    """A finetuning at its step, from the run's last checkpoint on."""

    def __init__(
        self,
        model: LanguageModel,
        flags: FlagSpec,
        curriculum: Curriculum,
        config: FlagTraining,
        examples: Sequence[Example],
        encoded: Sequence[Encoded],
        run: Run,
        *,
        kept: bool,
    ) -> None:
        self.kept = kept
        self.model, self.flags, self.curriculum, self.config, self.run = model, flags, curriculum, config, run
        self.examples, self.encoded = examples, encoded
        model.hf.requires_grad_(True)
        self.adam = Adam(model.hf, betas=BETAS, clip_norm=config.clip_norm, weight_decay=config.weight_decay)
        self.step, self.window, self._orders = 0, dict[str, float](), dict[int, np.ndarray]()
        checkpoint = latest_checkpoint(run.file(CHECKPOINTS))
        if checkpoint is not None:
            self._load(checkpoint)
        run.drop_metrics_after(self.step)

    @property
    def forced_steps(self) -> int:
        """Forced steps up to now."""
        return sum(self.curriculum.forces(step, self.config.steps, self.config.seed) for step in range(self.step))

    def run_to_end(self) -> None:
        """Take all steps that are left; log and save where it is time to.

        Raises:
            UserError: a loss, gradient or weight that is not finite, or a full disk.
        """
        config = self.config
        with Meter("finetuning", config.steps, done=self.step) as meter:
            while self.step < config.steps:
                self._take_step()
                done = self.step == config.steps
                if self.step % config.log_every == 0 or done:
                    meter.describe(self._log())
                if self.step % config.checkpoint_every == 0 or done:
                    self._save()
                meter.advance()
        self.model.hf.requires_grad_(False)

    def _batch(self) -> LabelledBatch:
        """Examples of the step: each epoch goes through all of them in an order of its own."""
        n, size = len(self.examples), self.config.batch_size
        which: list[int] = []
        for place in range(self.step * size, (self.step + 1) * size):
            epoch = place // n
            if epoch not in self._orders:
                rng = np.random.default_rng([self.config.seed, ORDER_STREAM, epoch])
                self._orders = {epoch - 1: self._orders.get(epoch - 1, np.arange(0)), epoch: rng.permutation(n)}
            which.append(int(self._orders[epoch][place % n]))
        return batch_of(self.model, self.flags, [self.examples[i] for i in which], [self.encoded[i] for i in which])

    def _take_step(self) -> None:
        config, phase = self.config, self.curriculum.at(self.step / self.config.steps)
        forced = self.curriculum.forces(self.step, config.steps, config.seed)
        batch = self._batch()
        with torch.enable_grad():
            loss = step_loss(self.model, self.flags, batch, forced=forced, weight=phase.weight, form=config.loss)
            if not bool(loss.total.isfinite()):
                raise self._diverged("loss", float(loss.total.detach()))
            loss.total.backward()
        norm = self.adam.step(config.lr_at(self.step))
        if not math.isfinite(norm):
            raise self._diverged("gradient norm", norm)
        self.model.hf.zero_grad(set_to_none=True)
        self.step += 1
        found = {"steps": 1.0, "cross_entropy": float(loss.cross_entropy.detach()), "grad_norm": norm}
        if loss.reading is not None:
            found |= {"read": 1.0, "flag_loss": float(loss.reading.loss.detach())}
            found |= strengths_right(loss.reading.strength, batch.labels)
        self.window = {name: self.window.get(name, 0.0) + found.get(name, 0.0) for name in {**self.window, **found}}

    def _log(self) -> str:
        """Log the means since the last line; returns them as the progress bar shows them."""
        w = self.window
        read, on, off = w.get("read", 0), w.get("on", 0), w.get("off", 0)
        line = {
            "cross_entropy": w["cross_entropy"] / w["steps"],
            "flag_loss": w["flag_loss"] / read if read else None,
            "flag_accuracy": (w["right_on"] / on + w["right_off"] / off) / 2 if on and off else None,
            "forced": 1 - read / w["steps"],
            "weight": self.curriculum.at((self.step - 1) / self.config.steps).weight,
            "grad_norm": w["grad_norm"] / w["steps"],
            "lr": self.config.lr_at(self.step - 1),
        }
        self.run.log(line, step=self.step)
        self.window = {}
        parts = {"CE": line["cross_entropy"], "flag loss": line["flag_loss"], "flag accuracy": line["flag_accuracy"]}
        shown = [f"{name} {value:.3f}" for name, value in parts.items() if value is not None]
        return f"finetuning ({', '.join(shown)})"

    def _diverged(self, what: str, value: float) -> UserError:
        """What to raise. A checkpoint of the very state that failed is removed: from there, all would fail again."""
        directory = self.run.file(CHECKPOINTS)
        good = withdraw_checkpoint(directory, self.step)
        last = "there is no good checkpoint"
        if good is not None:
            last = f"the last good checkpoint is step {good} in {directory}"
        why = f"the finetuning diverged; {last}"
        return UserError(f"{what} {value} at step {self.step}", why, "lower lr, or raise warmup_share")

    def _save(self) -> None:
        if not self.kept:
            return  # nothing can go on from a directory that goes
        weights = dict(self.model.hf.named_parameters())
        if not all(bool(weight.isfinite().all()) for weight in weights.values()):
            raise self._diverged("weight", math.nan)
        tensors = {f"model.{name}": weight.detach() for name, weight in weights.items()}
        tensors |= {f"adam.{name}": tensor for name, tensor in self.adam.state().items()}
        write_checkpoint(self.run.file(CHECKPOINTS), Checkpoint(self.step, tensors, {"window": self.window}))

    def _load(self, checkpoint: Checkpoint) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "adam": {}}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        with torch.no_grad():
            for name, weight in self.model.hf.named_parameters():
                weight.copy_(parts["model"][name])
        self.adam.load(parts["adam"])
        self.window, self.step = dict(checkpoint.facts["window"]), checkpoint.step
