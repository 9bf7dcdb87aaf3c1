"""The steps of a finetuning with flags, with checkpoints and snapshots, in one process or several.

A step is forced, and then its loss is the cross-entropy of the responses, or it adds λ times the flags' loss; the
curriculum says which and how much. Batches and forced steps depend on seed and step alone, so that a checkpoint needs
no random state. Dropout stays off.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.distributed import Ranks
from trimtab.errors import UserError
from trimtab.flags.adapters import trained_weights, writing_rows
from trimtab.flags.config import FlagTraining
from trimtab.flags.curricula import Curriculum
from trimtab.flags.examples import Encoded, Example, LabelledBatch, batch_of
from trimtab.flags.files import save_flags, snapshot_path
from trimtab.flags.measuring import strengths_right
from trimtab.flags.spec import FlagSpec
from trimtab.flags.steps import recomputed_layers, step_loss
from trimtab.lm import LanguageModel
from trimtab.runs import Meter, Run
from trimtab.training.checkpoint import Checkpoint, latest_checkpoint, withdraw_checkpoint, write_checkpoint
from trimtab.training.optimiser import Adam

CHECKPOINTS = "checkpoints"
"""Directory of a run from which it goes on."""
BETAS = (0.9, 0.999)
ORDER_STREAM = 32
"""Of the draws that order the examples of an epoch."""
COUNTS = ("right_on", "on", "right_off", "off")
SUMMED = ("total", "cross_entropy", "flag_loss", *COUNTS)
"""What the processes of a step add up besides gradients."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is finetuned."""

    model: LanguageModel
    """A copy of the given one, which becomes the model with flags."""
    flags: FlagSpec
    adapter: Any = None
    """The `PeftModel` around it, for LoRA."""

    def save(self, path: Path, about: Any, dtype: torch.dtype | None) -> None:
        """Save it in a run, where a kill may have left one of the same bits."""
        shutil.rmtree(path, ignore_errors=True)
        save_flags(self.model, self.flags, path, about, adapter=self.adapter, dtype=dtype)


class FlagTrainer:
    """A finetuning at its step, from the run's last checkpoint on.

    Args:
        subject: what is finetuned.
        curriculum: when flags are forced, and how much their loss weighs.
        config: all else.
        examples: to train on.
        encoded: the same as tokens.
        run: where metrics go, and where `kept` checkpoints and snapshots; None in all processes but the first.
        kept: whether the run's directory stays.
        ranks: the processes, each of which takes a part of every batch.
    """

    def __init__(
        self,
        subject: Subject,
        curriculum: Curriculum,
        config: FlagTraining,
        examples: Sequence[Example],
        encoded: Sequence[Encoded],
        run: Run | None,
        *,
        kept: bool,
        ranks: Ranks,
    ) -> None:
        self.subject, self.model, self.flags = subject, subject.model, subject.flags
        self.curriculum, self.config, self.run, self.kept, self.ranks = curriculum, config, run, kept, ranks
        self.examples, self.encoded = examples, encoded
        self.weights = trained_weights(self.model.hf, config.adapt)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        # A flag goes from 0 to the size of a coordinate while other dimensions move by a little. What writes it has
        # more to learn than the rest, and may learn it faster: nothing else changes with these rows. In `plain` too,
        # so that it differs in nothing but the flags' loss.
        self.flag_rows = writing_rows(self.model, self.flags) if config.flag_lr_factor != 1 else []
        self.flag_dims = torch.tensor(self.flags.flat_dims, device=self.model.device)
        self.adam = Adam(self.model.hf, betas=BETAS, clip_norm=config.clip_norm, weight_decay=config.weight_decay)
        self.step, self.tokens, self.window, self._orders = 0, 0, dict[str, float](), dict[int, np.ndarray]()
        checkpoint = ranks.broadcast(None if run is None else latest_checkpoint(run.file(CHECKPOINTS)))
        if checkpoint is not None:
            self._load(checkpoint)
        if run is not None:
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
        shown = Meter("finetuning", config.steps, done=self.step) if self.ranks.is_first else nullcontext()
        with shown as meter, recomputed_layers(self.model) if config.gradient_checkpointing else nullcontext():
            while self.step < config.steps:
                self.take_step()
                done = self.step == config.steps
                if self.step % config.log_every == 0 or done:
                    words = self._log()
                    if meter is not None:
                        meter.describe(words)
                if self.step in config.snapshot_steps:
                    self._keep_snapshot()
                if self.step % config.checkpoint_every == 0 or done:
                    self._save()
                if meter is not None:
                    meter.advance()
        self.model.hf.requires_grad_(False)

    def round_weights(self, dtype: torch.dtype) -> None:
        """Round what was trained to a precision, as it is when it is saved in that."""
        with torch.no_grad():
            for weight in self.weights.values():
                weight.copy_(weight.to(dtype))

    def _examples_of(self, step: int) -> list[int]:
        """Which examples a step takes: each epoch goes through all of them in an order of its own."""
        n, size = len(self.examples), self.config.batch_size
        which: list[int] = []
        for place in range(step * size, (step + 1) * size):
            epoch = place // n
            if epoch not in self._orders:
                rng = np.random.default_rng([self.config.seed, ORDER_STREAM, epoch])
                self._orders = {epoch - 1: self._orders.get(epoch - 1, np.arange(0)), epoch: rng.permutation(n)}
            which.append(int(self._orders[epoch][place % n]))
        return which

    def batch_at(self, step: int) -> LabelledBatch:
        """What this process takes in a step."""
        which = self._examples_of(step)[self.ranks.rank :: self.ranks.size]
        return batch_of(self.model, self.flags, [self.examples[i] for i in which], [self.encoded[i] for i in which])

    def take_step(self) -> None:
        """Take one step: forward, gradients, update.

        Raises:
            UserError: a loss or gradient that is not finite.
        """
        config, phase = self.config, self.curriculum.at(self.step / self.config.steps)
        forced = self.curriculum.forces(self.step, config.steps, config.seed)
        rows = [self.encoded[i] for i in self._examples_of(self.step)]
        batch = self.batch_at(self.step)
        tokens = sum(len(row.ids) - row.prompt_length for row in rows)
        losing = step_loss(
            self.model, self.flags, batch, forced=forced, weight=config.flag_weight * phase.weight, form=config.loss,
            tokens=tokens, autocast=config.autocast,
        )  # fmt: skip
        with torch.enable_grad(), losing as loss:
            loss.total.backward()
        parts = [loss.total.detach(), loss.cross_entropy.detach()]
        if loss.reading is not None and loss.flag_loss is not None:
            parts += [loss.flag_loss.detach(), *strengths_right(loss.reading.strength, batch.labels)]
        sums = torch.stack([part.float() for part in parts])
        self.ranks.add_up([*(weight.grad for weight in self.weights.values() if weight.grad is not None), sums])
        found = dict(zip(SUMMED, sums.tolist(), strict=False))
        if not math.isfinite(found["total"]):
            raise self._diverged("loss", found["total"])
        before = [written[self.flag_dims] for written in self.flag_rows]
        norm = float(self.adam.step(config.lr_at(self.step)))
        for written, old in zip(self.flag_rows, before, strict=True):
            written[self.flag_dims] = old + config.flag_lr_factor * (written[self.flag_dims] - old)
        if not math.isfinite(norm):
            raise self._diverged("gradient norm", norm)
        self.model.hf.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += sum(len(row.ids) for row in rows)
        found |= {"steps": 1.0, "read": float(not forced), "grad_norm": norm}
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
            "weight": self.config.flag_weight * self.curriculum.at((self.step - 1) / self.config.steps).weight,
            "grad_norm": w["grad_norm"] / w["steps"],
            "lr": self.config.lr_at(self.step - 1),
            "tokens": self.tokens,
        }
        if self.run is not None:
            self.run.log(line, step=self.step)
        self.window = {}
        parts = {"CE": line["cross_entropy"], "flag loss": line["flag_loss"], "flag accuracy": line["flag_accuracy"]}
        shown = [f"{name} {value:.3f}" for name, value in parts.items() if value is not None]
        return f"finetuning ({', '.join(shown)})"

    def _diverged(self, what: str, value: float) -> UserError:
        """What to raise. A checkpoint of the very state that failed is removed: from there, all would fail again."""
        last = "there is no good checkpoint"
        if self.run is not None:
            directory = self.run.file(CHECKPOINTS)
            good = withdraw_checkpoint(directory, self.step)
            if good is not None:
                last = f"the last good checkpoint is step {good} in {directory}"
        why = f"the finetuning diverged; {last}"
        return UserError(f"{what} {value} at step {self.step}", why, "lower lr, or raise warmup_share")

    def _keep_snapshot(self) -> None:
        """Of all weights in half the bytes, rounded to bfloat16; of an adapter, which is small, as it is."""
        if not self.kept or self.run is None:
            return
        about = {"step": self.step, "tokens": self.tokens, "chat": self.config.chat}
        dtype = torch.bfloat16 if self.subject.adapter is None else None
        self.subject.save(snapshot_path(self.run.path, self.step), about, dtype)

    def _save(self) -> None:
        if not self.kept or self.run is None:
            return  # nothing can go on from a directory that goes
        if not all(bool(weight.isfinite().all()) for weight in self.weights.values()):
            raise self._diverged("weight", math.nan)
        tensors = {f"model.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"adam.{name}": tensor for name, tensor in self.adam.state().items()}
        facts = {"window": self.window, "tokens": self.tokens}
        write_checkpoint(self.run.file(CHECKPOINTS), Checkpoint(self.step, tensors, facts))

    def _load(self, checkpoint: Checkpoint) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "adam": {}}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(parts["model"][name])
        self.adam.load(parts["adam"])
        self.window, self.tokens = dict(checkpoint.facts["window"]), checkpoint.facts["tokens"]
        self.step = checkpoint.step
