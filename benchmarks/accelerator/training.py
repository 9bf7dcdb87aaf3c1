"""Training steps of every architecture in every precision, beside dense ones in plain torch and other libraries'.

trimtab's step is `Trainer.advance`: gradients, clipping, AuxK, the L0 control, checks for NaN, on a CUDA device
replayed as a graph; "not captured" is the same without the graph. The plain step is `plain_steps.py`'s. They take
turns; other libraries' loops train, in lines of their own, between two turns of trimtab.
The floor is the encoder's product for all features, in the same precision. A bank's members take their steps one after
the other, on one batch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from figures import in_turn, product_rate, seconds, tf32_products
from sae_training.job import Job
from sae_training.rows import planted, take
from torch import Tensor

from accelerator import peers
from accelerator.plain_steps import LOSSES, PlainStep
from accelerator.sections import OutOfTime, Part, Peak, Row, Setup, say, time_limit
from trimtab.activations.synthetic import SyntheticSource
from trimtab.runs import Run
from trimtab.training import SiteRows, TrainConfig
from trimtab.training.rows import Batch
from trimtab.training.step_graph import BatchPlaces
from trimtab.training.trainer import Trainer

T = TypeVar("T")
BANK = ("topk", "batchtopk", "relu", "gated", "jumprelu")
"""Architectures of a bank, each at all of its sparsities."""
BATCHES = 4
"""Different batches that steps go round."""
MOST_STEPS = 1_000_000
"""Of the training that measured steps are the first of, so that nothing is saved among them."""


def parts(setup: Setup) -> Iterable[Part]:
    """In the order of what is wanted first, since time may run out; without an accelerator there is no TF32.

    Other libraries come behind all that is compiled: what dictionary_learning is built on changes torch when it is
    imported, and `torch.compile` fails from then on.
    """
    for precisions in (("tf32", "bf16") if setup.cuda else ("bf16",)), ("fp32",):
        for measure in (plain_rows, peer_rows):
            for precision, architecture in itertools.product(precisions, LOSSES):
                if measure is plain_rows or peers.names(architecture, bf16=precision == "bf16"):
                    others = "" if measure is plain_rows else ", other libraries"
                    yield Part(
                        name=f"{architecture} {precision}{others}",
                        measure=functools.partial(measure, setup, architecture, precision),
                        batch=setup.sizes.batch,
                    )
            if measure is plain_rows and precisions != ("fp32",):
                bank = functools.partial(bank_rows, setup, precisions[0])
                yield Part(name=f"bank {precisions[0]}", measure=bank, batch=setup.sizes.bank_batch)


def train_config(architecture: str, precision: str, *, n: int, k: int, batch: int) -> TrainConfig:
    """trimtab's defaults at these sizes."""
    settings: dict[str, Any] = {
        "arch": architecture, "n_features": n, "l0": float(k), "batch_size": batch, "rows": MOST_STEPS * batch,
        "checkpoint_every": MOST_STEPS, "sample_rows": batch, "dead_after": 10_000_000, "precision": precision,
    }  # fmt: skip
    return TrainConfig(**settings)


@functools.lru_cache(maxsize=1)
def rows_of(d: int, count: int, device: str) -> Tensor:
    """Synthetic rows of mean norm √d, on the device."""
    x = take(SyntheticSource(planted(d), rows_total=count), count)
    return (x * (math.sqrt(d) / float(x.norm(dim=1).mean()))).to(device)


class _Rows:
    """Rows in memory, to start a training from."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.d, self.rows_total = rows.cpu(), rows.shape[1], len(rows)
        self.description: dict[str, object] = {"kind": "benchmark"}

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Tensor]:
        return itertools.cycle(self.rows.split(batch_size))

    def sample(self, n: int) -> Tensor:
        return self.rows[:n]


class Steps:
    """trimtab's training of synthetic rows, a few steps at a time. A context, since it needs a directory for its run.

    Args:
        setup: sizes and device.
        architecture, precision: of what is trained.
        batch: rows of a step.
        places: of batches, shared with trainings that take turns with this one.
    """

    def __init__(
        self, setup: Setup, architecture: str, precision: str, batch: int, places: BatchPlaces | None = None
    ) -> None:
        self._places = places
        self.setup, self.architecture, self.precision, self.batch = setup, architecture, precision, batch
        self.bf16 = precision == "bf16"
        self.rows = rows_of(setup.sizes.d, BATCHES * batch, setup.device)
        self._batches = itertools.cycle(self.rows.split(batch))
        self.peak: dict[str, float | None] = {}
        """MiB by who trained."""

    def __enter__(self) -> Steps:
        sizes, device = self.setup.sizes, self.setup.device
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(tf32_products(self.precision == "tf32"))
            config = train_config(self.architecture, self.precision, n=sizes.n, k=sizes.k, batch=self.batch)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            run = stack.enter_context(Run.open(folder / "run", "train", config, device=device))
            with Peak(device) as held:
                self._trainer = Trainer.start(config, SiteRows(_Rows(self.rows)), run, device, places=self._places)
                self.several(self.advance, sizes.warmup_steps)()
            self.peak["trimtab"] = held.mib
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def advance(self, x: Tensor) -> None:
        """A step of trimtab."""
        self._trainer.advance(Batch(x))

    def advance_plainly(self, x: Tensor) -> None:
        """The same without a graph."""
        captured = self._trainer.captured
        before, captured.captures = captured.captures, False
        self.advance(x)
        captured.captures = before

    def several(self, step: Callable[[Tensor], object], count: int = 0) -> Callable[[], None]:
        """Some steps, as many as a turn has if nothing is said, on one batch after the other."""

        def run() -> None:
            for _ in range(count or self.setup.sizes.turn_steps):
                step(next(self._batches))

        return run

    def rate(self, seconds: float) -> float:
        """Rows per second in a turn that took so long."""
        return self.setup.sizes.turn_steps * self.batch / seconds

    def row(self, others: str, rate: float, over: dict[str, float]) -> Row:
        """A line of the table, with the floor: the encoder's product alone."""
        sizes = self.setup.sizes
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        weight = torch.randn(sizes.n, sizes.d, device=self.setup.device, dtype=dtype)
        floor = product_rate(self.batch, weight) / (2 * weight.numel())
        return Row(
            what=f"{self.architecture} {self.precision}{others}", rate=rate, unit="rows/s", over=over,
            of_floor=rate / floor, more={"peak_mib": self.peak},
        )  # fmt: skip


def plain_rows(setup: Setup, architecture: str, precision: str, batch: int) -> Iterator[Row]:
    """trimtab's rows per second over those of a plain step, in turns."""
    sizes, device = setup.sizes, setup.device
    with Steps(setup, architecture, precision, batch) as ours:
        arms = {"trimtab": ours.several(ours.advance), "not captured": ours.several(ours.advance_plainly)}
        for name in ("plain", "compiled") if _compiles(setup, architecture, precision) else ("plain",):
            with Peak(device) as held:
                step = PlainStep(
                    architecture, d=sizes.d, n=sizes.n, k=sizes.k, device=device, compiled=name == "compiled"
                )
                once = functools.partial(step, bf16=ours.bf16)
                if not _starts(f"{architecture} {precision}", ours.several(once, sizes.warmup_steps), name, setup):
                    continue
            arms[name], ours.peak[name] = ours.several(once), held.mib
        times = in_turn(arms, sizes.repeats, device)
        own = times.pop("trimtab")
        over = {
            name: statistics.median(b / a for a, b in zip(own, taken, strict=True)) for name, taken in times.items()
        }
        yield ours.row("", ours.rate(statistics.median(own)), over)


def bank_rows(setup: Setup, precision: str, batch: int) -> Iterator[Row]:
    """Steps per second of all members of a bank, over those of members that are not captured, of plain steps, and of
    SAELens's trainings one after the other, each architecture at its middle sparsity."""
    sizes, device = setup.sizes, setup.device
    places, turn = BatchPlaces(), sizes.turn_steps
    with ExitStack() as stack:
        members, plain = list[Steps](), list[Callable[[Tensor], object]]()
        for architecture, l0 in itertools.product(BANK, sizes.bank_l0):
            mine = dataclasses.replace(sizes, d=sizes.bank_d, n=sizes.bank_n, k=l0, batch=batch)
            member = Steps(dataclasses.replace(setup, sizes=mine), architecture, precision, batch, places)
            members.append(stack.enter_context(member))
            step = PlainStep(architecture, d=mine.d, n=mine.n, k=l0, device=device, compiled=False)
            plain.append(functools.partial(step, bf16=member.bf16))
        batches = itertools.cycle(members[0].rows.split(batch))

        def turns(steps: list[Callable[[Tensor], object]]) -> Callable[[], None]:
            def run() -> None:
                for _, x in zip(range(turn), batches, strict=False):
                    for step in steps:
                        step(x)

            return run

        arms = {
            "trimtab": turns([member.advance for member in members]),
            "not captured": turns([member.advance_plainly for member in members]),
            "plain": turns(plain),
        }
        for run in arms.values():
            run()
        times = in_turn(arms, sizes.repeats, device)
        own = times.pop("trimtab")
        over = {
            name: statistics.median(b / a for a, b in zip(own, taken, strict=True)) for name, taken in times.items()
        }
        rate = len(members) * turn / statistics.median(own)
        if (seconds := _saelens_seconds(members)) is not None:
            over["saelens"] = rate * seconds / len(members)
        whole = members[0].row("", rate * batch, {})
        yield dataclasses.replace(
            whole, what=f"bank of {len(members)} {precision}", rate=rate, unit="steps/s", over=over
        )


def middle(members: list[T]) -> list[T]:
    """Of a bank's members, the one of each architecture at its middle sparsity."""
    each = len(members) // len(BANK)
    return members[each // 2 :: each]


def _saelens_seconds(members: list[Steps]) -> float | None:
    """What SAELens takes for a step of every member; None where it is not here, or fails."""
    total = 0.0
    for member in middle(members):
        architecture, sizes = member.architecture, member.setup.sizes
        if "saelens" not in peers.names(architecture, bf16=member.bf16):
            return None
        steps = sizes.warmup_steps + sizes.turn_steps + 1
        job = Job(
            rows="", architecture=architecture, d=sizes.d, n=sizes.n, k=sizes.k, batch=member.batch, steps=steps,
            device=member.setup.device,
        )  # fmt: skip
        found = peers.train("saelens", job, member.rows, warmup=sizes.warmup_steps, autocast=member.bf16)
        if found is None:
            return None
        total += member.batch / found.rows_per_second * len(members) / len(BANK)
    return total


def peer_rows(setup: Setup, architecture: str, precision: str, batch: int) -> Iterator[Row]:
    """trimtab's rows per second over those of other libraries' loops, each between two turns of trimtab."""
    sizes, device = setup.sizes, setup.device
    steps = sizes.warmup_steps + sizes.repeats * sizes.turn_steps + 1
    job = Job(
        rows="", architecture=architecture, d=sizes.d, n=sizes.n, k=sizes.k, batch=batch, steps=steps, device=device
    )
    over: dict[str, float] = {}
    with Steps(setup, architecture, precision, batch) as ours:
        turn = ours.several(ours.advance)
        taken = [seconds(turn, device)]
        for name in peers.names(architecture, bf16=ours.bf16):
            found = peers.train(name, job, ours.rows, warmup=sizes.warmup_steps, autocast=ours.bf16)
            taken.append(seconds(turn, device))
            if found is not None:
                over[name] = ours.rate(sum(taken[-2:]) / 2) / found.rows_per_second
                ours.peak[name] = found.peak_mib
        yield ours.row(", other libraries", ours.rate(statistics.median(taken)), over)


def _compiles(setup: Setup, architecture: str, precision: str) -> bool:
    """Compiling each in each precision would take minutes: all are in TF32, and TopK in bfloat16, too."""
    return setup.sizes.compile_seconds > 0 and (precision == "tf32" or (architecture, precision) == ("topk", "bf16"))


def _starts(what: str, warm_up: Callable[[], None], name: str, setup: Setup) -> bool:
    """Take the first steps. Whether they came to an end: what is compiled may take too long, or fail."""
    if name != "compiled":
        warm_up()
        return True
    try:
        with time_limit(setup.sizes.compile_seconds):
            warm_up()
    except OutOfTime:
        say(f"{what}: torch.compile takes more than {setup.sizes.compile_seconds:g} s")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        say(f"{what}: torch.compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    else:
        return True
    return False
