"""The one training loop: any number of trainings, each at its own step, on streams that they share.

On a CPU with several cores trainings run side by side in threads with few torch threads each, since much of a sparse
step does not spread over threads (`benchmarks/bank_batching.py` compares the two). No result depends on how many run
side by side: a training sees the same batches, and its arithmetic depends on torch's threads per training alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from trimtab.activations import ActivationSource
from trimtab.runs import Meter, Run
from trimtab.training.config import TrainConfig
from trimtab.training.result import TrainResult
from trimtab.training.rows import SiteRows, Stream
from trimtab.training.step_graph import BatchPlaces
from trimtab.training.trainer import Trainer


@dataclass(eq=False)
class Training:
    """One SAE to train: what goes in and, once it has ended, a result or an error."""

    config: TrainConfig
    rows: SiteRows
    run: Run
    """Open while the training goes on."""
    delay: int = 0
    """Checkpoints come so many steps later, lest all trainings write at once."""
    by_autograd: bool = False
    """Differentiate the architecture's `loss` even where its gradients are written out: slower, equal to rounding."""
    result: TrainResult | None = None
    error: Exception | None = None
    trainer: Trainer | None = field(default=None, repr=False)
    """There while the training goes on."""

    @property
    def step(self) -> int:
        """Steps done, while the training goes on."""
        assert self.trainer is not None
        return self.trainer.step

    @property
    def stream(self) -> tuple[int, int]:
        """Equal for trainings that see the same batches."""
        return id(self.rows), self.config.batch_size


class Threads(NamedTuple):
    """How trainings share the processor."""

    workers: int
    """Trainings that run side by side."""
    each: int
    """Threads that torch may use for one of them."""


def train(
    config: TrainConfig,
    source: ActivationSource,
    run: Run,
    *,
    heldout: ActivationSource | None = None,
    device: str | torch.device = "cpu",
    by_autograd: bool = False,
) -> TrainResult:
    """Train an SAE, or go on from the run's last checkpoint, and save it in the run as `sae/`.

    With equal device, threads and versions a resumed training ends with the same bits as one that was never stopped.
    `metrics.jsonl` gets, every `log_every` steps, means since the last line: loss, explained_variance (within batches),
    l0, sparsity, aux, grad_norm; and as of now lr, the SAE's own `metrics()`, dead_features, rows_per_second.

    Args:
        config: how.
        source: rows to train on.
        run: an open run; the caller finishes it.
        heldout: rows on which the result is measured; without it, rows of `source`.
        device: where to compute.
        by_autograd: differentiate the architecture's `loss` even where its gradients are written out.

    Returns:
        What was trained, measured on `heldout`.

    Raises:
        UserError: rows that are not finite, a loss that is not finite (earlier checkpoints stay), a held-out source of
            another width, another source than the run began with, a damaged checkpoint, a full disk.
    """
    training = Training(config, SiteRows(source, heldout), run, by_autograd=by_autograd)
    train_all([training], device=device)
    if training.error is not None:
        raise training.error
    assert training.result is not None
    return training.result


def train_all(
    trainings: Sequence[Training],
    *,
    device: str | torch.device = "cpu",
    threads: Threads | None = None,
    on_end: Callable[[Training], None] = lambda _training: None,
) -> None:
    """Train several SAEs, each from the last checkpoint of its run; one that fails does not stop the others.

    Trainings on one site's rows with one batch size share the stream of batches, and those of one stream are in memory
    at the same time.

    Args:
        trainings: what to train; `result` or `error` of each is set.
        device: where to compute.
        threads: how many run side by side; by default one, with all of torch's threads.
        on_end: called when a training has ended either way.

    Raises:
        UserError: rows cannot be read, such as from a truncated shard. What was saved until then stays.
    """
    threads = threads or Threads(1, torch.get_num_threads())
    total = sum(t.config.steps(t.rows.source.rows_total) for t in trainings)

    def ended(training: Training) -> None:
        on_end(training)
        meter.describe(_progress(trainings))

    with Meter(_progress(trainings), total) as meter, ExitStack() as stack:
        stack.enter_context(_torch_threads(threads.each))
        executor: Executor = _Here()
        if threads.workers > 1:
            executor = stack.enter_context(
                ThreadPoolExecutor(threads.workers, "training", torch.set_num_threads, (threads.each,))
            )
        for wave in _waves(trainings, threads.workers):
            _Wave(wave, executor, threads.workers, device, meter, ended).run()


class _Wave:
    """Trainings that are in memory together. Batches are read, and tasks given out, by the calling thread alone."""

    def __init__(
        self,
        trainings: Iterable[Training],
        executor: Executor,
        workers: int,
        device: str | torch.device,
        meter: Meter,
        on_end: Callable[[Training], None],
    ) -> None:
        self.live = list(trainings)
        self.executor, self.workers, self.device, self.meter, self.on_end = executor, workers, device, meter, on_end
        self.places = BatchPlaces()
        self.streams: dict[tuple[int, int], Stream] = {}
        self.running: dict[Future[None], Training] = {}

    def run(self) -> None:
        sites = [training.rows for training in self.live]
        for training in list(self.live):
            self._submit(training, self._start)
        while self.running:
            self._collect()
        self._open_streams()
        while self.live:
            self._give_out_steps()
            if any(stream.read() for stream in self.streams.values()):
                continue
            assert self.running, "nothing runs and nothing can"
            self._collect()
        for rows in sites:
            rows.forget()

    def _start(self, t: Training) -> None:
        about = json.dumps(t.rows.source.description, sort_keys=True, default=str)
        t.run.record(hashes={"source": hashlib.sha256(about.encode()).hexdigest()[:16]})
        t.trainer = Trainer.start(t.config, t.rows, t.run, self.device, t.delay, self.places)
        t.trainer.sae.by_autograd = t.by_autograd

    def _open_streams(self) -> None:
        """Each stream begins where the training that is farthest behind needs it."""
        for key in dict.fromkeys(training.stream for training in self.live):
            group = [training for training in self.live if training.stream == key]
            trainers = [training.trainer for training in group if training.trainer is not None]
            self.meter.advance(sum(trainer.step for trainer in trainers))
            steps = range(min(trainer.step for trainer in trainers), max(trainer.steps for trainer in trainers))
            source, batch_size = group[0].rows.source, group[0].config.batch_size
            self.streams[key] = Stream(source, batch_size, steps, self.device)

    def _give_out_steps(self) -> None:
        """The training that is farthest behind goes first."""
        busy = {id(training) for training in self.running.values()}
        for training in sorted((t for t in self.live if id(t) not in busy), key=lambda t: t.step):
            if len(self.running) >= self.workers:
                return
            trainer = training.trainer
            assert trainer is not None
            if trainer.done:
                self._submit(training, self._finish)
            elif (batch := self.streams[training.stream].batch(trainer.step)) is not None:
                batch.scaled(trainer.scale, trainer.sae.b_dec.dtype)
                self._submit(training, lambda _, trainer=trainer, batch=batch: trainer.advance(batch))  # pyright: ignore

    def _finish(self, training: Training) -> None:
        assert training.trainer is not None
        training.result = training.trainer.finish(training.rows)

    def _submit(self, training: Training, work: Callable[[Training], None]) -> None:
        self.running[self.executor.submit(work, training)] = training

    def _collect(self) -> None:
        for future in wait(self.running, return_when=FIRST_COMPLETED).done:
            training = self.running.pop(future)
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            training.error = error
            if error is not None or training.result is not None:
                self._end(training)
            elif self.streams:
                self.meter.advance()
        for key in list(self.streams):
            if steps := [training.step for training in self.live if training.stream == key]:
                self.streams[key].drop_before(min(steps))
            else:
                del self.streams[key]

    def _end(self, training: Training) -> None:
        if training.trainer is not None:
            self.meter.advance(training.trainer.steps - training.trainer.step)
        self.live.remove(training)
        training.trainer = None
        self.on_end(training)


class _Here(Executor):
    """Runs what it is given at once, in the calling thread."""

    def submit(self, fn, /, *args, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _waves(trainings: Sequence[Training], workers: int) -> Iterator[list[Training]]:
    """Trainings stream by stream; several streams together only as long as one alone would leave workers idle."""
    groups: dict[tuple[int, int], list[Training]] = {}
    for training in trainings:
        groups.setdefault(training.stream, []).append(training)
    wave: list[Training] = []
    for group in groups.values():
        wave += group
        if len(wave) >= workers:
            yield wave
            wave = []
    if wave:
        yield wave


def _progress(trainings: Sequence[Training]) -> str:
    if len(trainings) == 1:
        return "training"
    done = sum(training.result is not None for training in trainings)
    failed = sum(training.error is not None for training in trainings)
    return f"training {len(trainings)} SAEs" + f", {done} done" * bool(done) + f", {failed} failed" * bool(failed)


@contextmanager
def _torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
