"""The state of one training and its step: gradients, Adam, averaging, metrics, checkpoints.

On an accelerator a step waits for nothing: what it counted, and whether it was finite, is looked at when metrics are
logged and before anything is saved. A step that is not finite changes no weights, nor does any after it.

There a step is replayed as a graph, too, so that the host need not launch its kernels one by one: all that it changes,
it changes in place (`_take`), and what Python goes by is the graph's key (`training.step_graph`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import partial

import torch
from torch import Tensor

from trimtab.dictionaries.precision import Precision
from trimtab.dictionaries.topk_like import looks_late
from trimtab.dictionaries.trainable import TrainableSAE
from trimtab.errors import UserError
from trimtab.lm.captured import Captured, say_once
from trimtab.runs import Run
from trimtab.runs.atomic import remove_partial_files
from trimtab.training.checkpoint import Checkpoint, latest_checkpoint, withdraw_checkpoint, write_checkpoint
from trimtab.training.config import TrainConfig
from trimtab.training.execution import fastest_execution, is_measured
from trimtab.training.export import export
from trimtab.training.late import Clock, FirstFault, Sums
from trimtab.training.optimiser import Adam
from trimtab.training.result import TrainResult
from trimtab.training.rows import Batch, SiteRows, bad_rows, input_scale
from trimtab.training.step_graph import BatchPlaces, UnknownValueError, python_values

CHECKPOINTS = "checkpoints"
OF_LOSS = ("sparsity", "aux", "squared_error", "variance", "l0")
"""What is summed of every loss between two lines of metrics, beside the total."""
SUMMED = ("grad_norm", "loss", *OF_LOSS)


class Trainer:
    """One SAE in training. Made by `Trainer.start`; `advance` takes a step, `finish` saves the SAE.

    Attributes:
        step: steps done.
        steps: steps in all.
        scale: what rows are multiplied by.
        captured: replays steps as graphs, where it may.
    """

    def __init__(
        self, config: TrainConfig, run: Run, sae: TrainableSAE, steps: int, scale: float, delay: int,
        places: BatchPlaces | None = None,
    ) -> None:  # fmt: skip
        self.config, self.run, self.sae, self.steps, self.scale = config, run, sae, steps, scale
        self.adam = Adam(sae, betas=(config.beta1, config.beta2), clip_norm=config.clip_norm)
        self.average: dict[str, Tensor] | None = None
        device = sae.b_dec.device
        self.window = Sums(SUMMED, device)  # since the last line of metrics
        self.step = 0
        self._late, self._fault, self._clock = looks_late(device), FirstFault(device), Clock(device)
        self._places = places or BatchPlaces()
        self.captured = Captured(device, f"training of {sae.architecture} SAEs")
        self._lr = torch.zeros((), device=device) if self.captured.captures else None  # where a graph finds it
        self._n_dead = torch.zeros((), dtype=torch.long, device=device)
        self._key: tuple[tuple[str, Hashable], ...] = ()
        self._delay = delay
        self._logged_at = 0.0

    @classmethod
    def start(
        cls, config: TrainConfig, rows: SiteRows, run: Run, device: str | torch.device = "cpu", delay: int = 0,
        places: BatchPlaces | None = None,
    ) -> Trainer:  # fmt: skip
        """From the last checkpoint of the run, or with fresh weights; `delay` moves checkpoints so many steps behind
        the multiples of `checkpoint_every`, and `places` are shared with trainings that take turns with this one.

        Raises a `UserError` if rows cannot be used, or the checkpoint is damaged or of other rows.
        """
        directory = run.file(CHECKPOINTS)
        directory.mkdir(exist_ok=True)
        remove_partial_files(directory)
        steps = config.steps(rows.source.rows_total)
        checkpoint = latest_checkpoint(directory)
        sae = config.build(rows.source.d, steps, device, _begun_in(checkpoint, device))
        run.record(precision=sae.config.precision)
        if checkpoint is None:
            scale = input_scale(rows.sample(config.sample_rows), config.scaling)
            trainer = cls(config, run, sae, steps, scale, delay, places)
            sae.initialise(rows.sample(config.sample_rows, scale).to(device))
            run.drop_metrics_after(0)
            return trainer
        trainer = cls(config, run, sae, steps, checkpoint.facts["input_scale"], delay, places)
        trainer._load(checkpoint)
        run.drop_metrics_after(checkpoint.step)
        return trainer

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self.step == self.steps

    def advance(self, batch: Batch) -> None:
        """Take one step; log and save where it is time to.

        Raises:
            UserError: rows, a loss or a gradient that is not finite (good checkpoints stay), a full disk, or a step
                that does not fit in the device's memory.
        """
        try:
            self._advance(batch)
        except torch.OutOfMemoryError as error:
            c = self.config
            what = f"a training step of {c.batch_size} rows for {c.n_features} features"
            smaller = f"--batch-size {c.batch_size // 2}" if c.batch_size > 1 else "fewer --n-features"
            hint = f"begin anew with {smaller} in another --run directory"
            raise UserError(what, f"{self.sae.b_dec.device} has no room for it", hint) from error

    def _advance(self, batch: Batch) -> None:
        x = batch.scaled(self.scale, self.sae.b_dec.dtype)
        with self._clock.step():
            self.sae.set_progress(self.step / self.steps)
            self.sae.prepare(x)
        if is_measured(self.sae):
            self.sae.execution = fastest_execution(self.sae, x)
            self.run.record(execution=self.sae.execution)
        with self._clock.step():
            self._step(x)
        logs = self.step % self.config.log_every == 0 or self.done
        saves = (self.step - self._delay) % self.config.checkpoint_every == 0 or self.done
        if self._late and (logs or saves):
            self._look()
        if logs:
            self._log()
        if saves:
            self._save()

    def finish(self, rows: SiteRows) -> TrainResult:
        """Save the SAE in the run and measure it."""
        if self.average is not None:
            for name, parameter in self.sae.named_parameters():
                parameter.data.copy_(self.average[name])
            self.sae.constrain()
        return export(self.config, self.sae, self.scale, rows, self.run, self.steps, self._clock.seconds())

    def _step(self, x: Tensor) -> None:
        config = self.config
        lr = config.peak_lr * config.lr_factor(self.step, self.steps)
        if self._lr is not None:
            lr = self._lr.fill_(lr)
        averages = bool(config.ema_decay) and self.step >= config.first_averaged_step(self.steps)
        if self.captured.captures and not self.sae.waits:
            self._take_captured(x, lr, averages)
        else:
            self._take(x, lr, averages)
        self.step += 1

    def _take_captured(self, x: Tensor, lr: float | Tensor, averages: bool) -> None:
        """A step by a graph, where there is one for what Python goes by in it."""
        try:
            values = python_values(self.sae)
        except UnknownValueError as error:
            self.captured.refuse(f"{error} may hold anything; name it in not_in_step if nothing in a step goes by it")
            return self._take(x, lr, averages)
        key = *values, ("averages", averages), ("average", id(self.average))
        if self.captured.is_unsettled:
            self._say_what_changes(key)
        self._key = key
        work = partial(self._take, self._places.placed(x), lr, averages)
        replay = self.captured.may_replay(self.sae)
        self.captured(work, replay=replay, key=key, changes=self._state)

    def _say_what_changes(self, key: tuple[tuple[str, Hashable], ...]) -> None:
        changed = ", ".join(sorted({name for name, _ in set(key) ^ set(self._key)})) or "what Python goes by"
        say_once(f"{self.captured.what} is not captured as a graph so far, which is slower: {changed} keeps changing")

    def _take(self, x: Tensor, lr: float | Tensor, averages: bool) -> None:
        """What a step does to tensors."""
        sae = self.sae
        loss = sae.backward_prepared(x)
        sae.project_gradients()
        grad_norm = self.adam.step(lr, skip=self._fault.seen | ~loss.total.isfinite())
        self._fault.note(loss.total, grad_norm, x)
        if not self._late:
            self._look()
        sae.zero_grad(set_to_none=True)  # so that trainings side by side need memory for one set of gradients
        sae.constrain()
        if averages:
            self._update_average()
        self.window.add({"grad_norm": grad_norm, "loss": loss.total, **{n: getattr(loss, n) for n in OF_LOSS}})
        self._n_dead.copy_(torch.as_tensor(loss.n_dead))

    def _state(self) -> list[Tensor]:
        """All that a step changes."""
        sae = [*self.sae.parameters(), *self.sae.buffers()]
        beside = [*self.adam.state().values(), *(self.average or {}).values(), self._n_dead]
        return [one.detach() for one in (*sae, *beside, *self._fault.state, *self.window.state)]

    def _look(self) -> None:
        """Raise a `UserError` that names the first step that was not finite, if there was one."""
        if (fault := self._fault.found()) is None:
            return
        if not math.isfinite(fault.loss):
            if fault.bad_rows:
                raise bad_rows(fault.bad_rows, self.config.batch_size, f"the batch of step {fault.step}")
            raise self._diverged("loss", fault.loss, fault.step)
        raise self._diverged("gradient norm", fault.grad_norm, fault.step)

    def _update_average(self) -> None:
        weights = {name: parameter.detach() for name, parameter in self.sae.named_parameters()}
        if self.average is None:
            self.average = {name: weight.clone() for name, weight in weights.items()}
            return
        for name, weight in weights.items():
            self.average[name].lerp_(weight, 1 - self.config.ema_decay)

    def _diverged(self, what: str, value: float, step: int) -> UserError:
        """What to raise. A checkpoint of the very state that failed is removed: from there, all would fail again."""
        directory = self.run.file(CHECKPOINTS)
        good = withdraw_checkpoint(directory, step)
        last = "there is no good checkpoint"
        if good is not None:
            last = f"the last good checkpoint is step {good} in {directory}"
        return UserError(
            f"{what} {value} at step {step}", f"training diverged; {last}", "lower --lr, or raise --warmup-share"
        )

    def _log(self) -> None:
        sums, seconds = self.window.read(), self._clock.seconds()
        steps = sums["steps"]
        means = {name: sums[name] / steps for name in ("loss", "l0", "sparsity", "aux", "grad_norm")}
        line = {
            "explained_variance": 1 - sums["squared_error"] / max(sums["variance"], 1e-30),
            **means,
            "lr": self.config.peak_lr * self.config.lr_factor(self.step - 1, self.steps),
            **self.sae.metrics(),
            "dead_features": int(self._n_dead),
            "rows_per_second": steps * self.config.batch_size / max(seconds - self._logged_at, 1e-9),
        }
        self.run.log(line, step=self.step)
        self.window.clear()
        self._logged_at = seconds

    def _save(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.sae.parameters()):
            raise self._diverged("weight", math.nan, self.step)
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        tensors |= {f"adam.{name}": tensor for name, tensor in self.adam.state().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in (self.average or {}).items()}
        facts = {"input_scale": self.scale, "d": self.sae.d, "window": self.window.read()}
        how = {"precision": self.sae.config.precision, "execution": self.sae.execution}
        write_checkpoint(self.run.file(CHECKPOINTS), Checkpoint(self.step, tensors, facts | how))
        self.sae.look_again()
        if self._late:
            self.run.record(captured=self.captured.replays > 0)

    def _load(self, checkpoint: Checkpoint) -> None:
        if checkpoint.facts["d"] != self.sae.d:
            raise UserError(
                f"rows of width {self.sae.d}",
                f"the checkpoint in {self.run.path} was trained on width {checkpoint.facts['d']}",
                "choose another --run directory",
            )
        if self.config.precision == "bf16" and "precision" not in checkpoint.facts:
            raise UserError(
                f"run {self.run.path}",
                "it began when bfloat16 was of the encoder's product alone, and would go on otherwise",
                "begin anew in another --run directory",
            )
        parts: dict[str, dict[str, Tensor]] = {"sae": {}, "adam": {}, "average": {}}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.sae.load_state_dict(parts["sae"])
        self.adam.load(parts["adam"])
        device = self.sae.b_dec.device
        self.average = {name: tensor.to(device) for name, tensor in parts["average"].items()} or None
        self.window = Sums(SUMMED, device, checkpoint.facts["window"])
        self.step = checkpoint.step
        self._fault = FirstFault(device, self.step)
        if self._late:  # elsewhere the share of active pairs decides
            self.sae.execution = checkpoint.facts.get("execution")


def _begun_in(checkpoint: Checkpoint | None, device: str | torch.device) -> Precision | None:
    """The precision of products in which a training goes on that leaves it to the device: that in which it began, fp32
    before there was a choice."""
    if checkpoint is None or not looks_late(torch.device(device)):
        return None
    return checkpoint.facts.get("precision", "fp32")
