"""The training loop: batches in, metrics and checkpoints out, exact resumption after a kill."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries.trainable import StepLoss, TrainableSAE
from trimtab.errors import UserError
from trimtab.runs import Meter, Run
from trimtab.runs.atomic import remove_partial_files
from trimtab.training.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint
from trimtab.training.config import TrainConfig
from trimtab.training.export import TrainResult, export
from trimtab.training.optimiser import Adam
from trimtab.training.schedule import first_averaged_step, lr_factor

if TYPE_CHECKING:
    from trimtab.activations import ActivationSource

CHECKPOINTS = "checkpoints"


def train(
    config: TrainConfig, source: ActivationSource, run: Run, *, heldout: ActivationSource | None = None
) -> TrainResult:
    """Train an SAE, or go on from the run's last checkpoint, and save it in the run as `sae/`.

    With equal device, threads and versions a resumed training ends with the same bits as one that was never stopped.
    `metrics.jsonl` gets, every `log_every` steps, means since the last line: loss, explained_variance (within batches),
    l0, sparsity, aux, grad_norm; and as of now lr, what the SAE's `knobs()` say, dead_features, rows_per_second.

    Args:
        config: how.
        source: rows to train on.
        run: an open run; the caller finishes it.
        heldout: rows on which the result is measured; without it, rows of `source`.

    Returns:
        What was trained, measured on `heldout`.

    Raises:
        UserError: rows that are not finite, a loss that is not finite (earlier checkpoints stay), a held-out source of
            another width, another source than the run began with, a damaged checkpoint, a full disk.
    """
    if heldout is not None and heldout.d != source.d:
        raise UserError(
            f"held-out rows of width {heldout.d}", f"the training rows have width {source.d}", "harvest the same site"
        )
    run.record(hashes={"source": _hash(source.description)})
    trainer = _Trainer.start(config, source, run)
    seconds = trainer.run_all(source)
    return export(config, trainer.averaged_sae(), trainer.scale, source, heldout, run, trainer.steps, seconds)


@dataclass
class _Window:
    """Sums since the last logged line."""

    steps: int = 0
    loss: float = 0.0
    aux: float = 0.0
    sparsity: float = 0.0
    squared_error: float = 0.0
    variance: float = 0.0
    l0: float = 0.0
    grad_norm: float = 0.0
    began: float = 0.0

    def add(self, step: StepLoss, grad_norm: float) -> None:
        self.steps += 1
        self.loss += float(step.loss)
        self.aux += float(step.aux)
        self.sparsity += float(step.sparsity)
        self.squared_error += float(step.squared_error)
        self.variance += float(step.variance)
        self.l0 += step.l0
        self.grad_norm += grad_norm

    def means(self) -> dict[str, float]:
        summed = {name: getattr(self, name) / self.steps for name in ("loss", "l0", "sparsity", "aux", "grad_norm")}
        return {"explained_variance": 1 - self.squared_error / max(self.variance, 1e-30), **summed}


class _Trainer:
    """The state of one training: the SAE, Adam, the average of the weights, the step."""

    def __init__(self, config: TrainConfig, run: Run, sae: TrainableSAE, steps: int, scale: float) -> None:
        self.config, self.run, self.sae, self.steps, self.scale = config, run, sae, steps, scale
        self.adam = Adam(sae, betas=(config.beta1, config.beta2), clip_norm=config.clip_norm)
        self.average: dict[str, Tensor] | None = None
        self.step = 0
        self.last_checkpoint: int | None = None

    @classmethod
    def start(cls, config: TrainConfig, source: ActivationSource, run: Run) -> _Trainer:
        """From the last checkpoint of the run, or with fresh weights."""
        directory = run.file(CHECKPOINTS)
        directory.mkdir(exist_ok=True)
        remove_partial_files(directory)
        steps = config.steps(source.rows_total)
        sae = config.build(source.d, steps)
        checkpoint = latest_checkpoint(directory)
        if checkpoint is None:
            sample = finite_rows(source.sample(config.sample_rows), "the sample of rows")
            trainer = cls(config, run, sae, steps, input_scale(sample, config))
            sae.initialise(sample * trainer.scale)
            return trainer
        trainer = cls(config, run, sae, steps, checkpoint.facts["input_scale"])
        trainer._load(checkpoint)
        run.drop_metrics_after(checkpoint.step)
        return trainer

    def run_all(self, source: ActivationSource) -> float:
        """All steps that are left. Returns the seconds that they took."""
        began = time.perf_counter()
        window = _Window(began=began)
        batches = source.batches(self.config.batch_size, start_step=self.step)
        with Meter("training", self.steps) as meter:
            meter.advance(self.step)
            while self.step < self.steps:
                loss, grad_norm = self._step(next(batches))
                window.add(loss, grad_norm)
                meter.advance()
                if self.step % self.config.log_every == 0 or self.step == self.steps:
                    window = self._log(window, loss)
                if self.step % self.config.checkpoint_every == 0 or self.step == self.steps:
                    self._save()
        return time.perf_counter() - began

    def averaged_sae(self) -> TrainableSAE:
        """The SAE with the average of the weights, if the config asks for one; decoder rows of norm 1."""
        if self.average is not None:
            for name, parameter in self.sae.named_parameters():
                parameter.data.copy_(self.average[name])
            self.sae.constrain()
        return self.sae

    def _step(self, rows: Float[Tensor, "B d"]) -> tuple[StepLoss, float]:
        sae, config = self.sae, self.config
        sae.begin_step(self.step / self.steps)
        loss = sae.gradients(rows.to(sae.b_dec.dtype) * self.scale)
        if not math.isfinite(float(loss.loss)):
            finite_rows(rows, f"the batch of step {self.step}")
            raise self._diverged("loss", float(loss.loss))
        sae.project_gradients()
        grad_norm = self.adam.step(config.peak_lr * lr_factor(config, self.step, self.steps))
        if not math.isfinite(grad_norm):
            raise self._diverged("gradient norm", grad_norm)
        sae.constrain()
        self.step += 1
        if config.ema_decay and self.step > first_averaged_step(config, self.steps):
            self._update_average()
        return loss, grad_norm

    def _update_average(self) -> None:
        weights = {name: parameter.detach() for name, parameter in self.sae.named_parameters()}
        if self.average is None:
            self.average = {name: weight.clone() for name, weight in weights.items()}
            return
        for name, weight in weights.items():
            self.average[name].lerp_(weight, 1 - self.config.ema_decay)

    def _diverged(self, what: str, value: float) -> UserError:
        last = "there is no checkpoint yet"
        if self.last_checkpoint is not None:
            last = f"the last good checkpoint is step {self.last_checkpoint} in {self.run.file(CHECKPOINTS)}"
        return UserError(
            f"{what} {value} at step {self.step}", f"training diverged; {last}", "lower --lr, or raise --warmup-share"
        )

    def _log(self, window: _Window, loss: StepLoss) -> _Window:
        now = time.perf_counter()
        current = {
            "lr": self.config.peak_lr * lr_factor(self.config, self.step - 1, self.steps),
            **self.sae.knobs(),
            "dead_features": loss.n_dead,
            "rows_per_second": window.steps * self.config.batch_size / (now - window.began),
        }
        self.run.log({**window.means(), **current}, step=self.step)
        return _Window(began=now)

    def _save(self) -> None:
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        tensors |= {f"adam.{name}": tensor for name, tensor in self.adam.state().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in (self.average or {}).items()}
        checkpoint = Checkpoint(self.step, tensors, {"input_scale": self.scale, "d": self.sae.d})
        write_checkpoint(self.run.file(CHECKPOINTS), checkpoint)
        self.last_checkpoint = self.step

    def _load(self, checkpoint: Checkpoint) -> None:
        if checkpoint.facts["d"] != self.sae.d:
            raise UserError(
                f"rows of width {self.sae.d}",
                f"the checkpoint in {self.run.path} was trained on width {checkpoint.facts['d']}",
                "choose another --run directory",
            )
        parts: dict[str, dict[str, Tensor]] = {"sae": {}, "adam": {}, "average": {}}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.sae.load_state_dict(parts["sae"])
        self.adam.load(parts["adam"])
        self.average = parts["average"] or None
        self.step = self.last_checkpoint = checkpoint.step


def input_scale(sample: Float[Tensor, "m d"], config: TrainConfig) -> float:
    """The scalar that rows are multiplied by: E‖x‖ = √d, E‖x‖² = 1, or 1."""
    norms = sample.double().norm(dim=1)
    if config.scaling == "none":
        return 1.0
    if not norms.any():
        raise UserError("the sample of rows", "all rows are zero, so that they cannot be scaled", "check the harvest")
    if config.scaling == "sqrt_d":
        return float(math.sqrt(sample.shape[1]) / norms.mean())
    return float(1 / norms.square().mean().sqrt())


def finite_rows(rows: Float[Tensor, "m d"], what: str) -> Float[Tensor, "m d"]:
    """`rows`, if all are finite.

    Raises:
        UserError: they are not.
    """
    bad = ~rows.isfinite().all(1)
    if bad.any():
        raise UserError(
            f"{int(bad.sum())} of {len(rows)} rows in {what}", "they hold NaN or infinity", "harvest the site again"
        )
    return rows


def _hash(description: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()[:16]
