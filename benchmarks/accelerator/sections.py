"""What a section measures, and how it is run: within its time, at half the batch where memory runs out."""

from __future__ import annotations

import functools
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import random_model

from trimtab.lm import LanguageModel

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of everything that is measured; by default those of Gemma 2 2B."""

    d: int = 2304
    n: int = 16_384
    k: int = 64
    batch: int = 4096
    """Rows of a training step."""
    bank_d: int = 576
    bank_n: int = 4096
    bank_batch: int = 2048
    bank_l0: tuple[int, ...] = (8, 16, 24, 32, 48, 64)
    """Sparsities of each architecture of a bank."""
    warmup_steps: int = 10
    turn_steps: int = 20
    repeats: int = 3
    compile_seconds: float = 20
    """How long `torch.compile` may take to start; 0 leaves it out."""
    shapes: tuple[str, ...] = ("smollm2-135m", "gemma-2-2b")
    """Models, of `shapes.SHAPES`; the last one is also that of prompts, harvest and scoring, the first one that of
    policies."""
    rows: tuple[int, ...] = (64, 1)
    """Prompts that are decoded side by side."""
    new_tokens: int = 64
    profiled_tokens: int = 32
    decode_repeats: int = 2
    lengths: tuple[int, ...] = (40, 180, 440, 950)
    """Of prompts, each with a larger cache."""
    leak_decodes: int = 1000
    leak_seconds: float = 15
    leak_rows: int = 4
    leak_tokens: int = 24
    ahead: int = 8
    prompt_tokens: int = 256
    harvest_tokens: int = 131_072
    harvest_batch: int = 64
    context: int = 256
    features: int = 16_384
    """Features that are scored."""
    score_batch: int = 1024
    naive: int = 16
    policy_features: int = 5120
    sentences: int = 32
    copies: int = 8


SMALL = Sizes(
    d=64, n=256, k=8, batch=128, bank_d=64, bank_n=256, bank_batch=128, bank_l0=(2, 3, 4, 5, 6, 8), warmup_steps=1,
    turn_steps=2, repeats=1, compile_seconds=0, shapes=("tiny",),
    rows=(3, 1), new_tokens=5, profiled_tokens=8, decode_repeats=1, lengths=(20, 70), leak_decodes=20, leak_tokens=4,
    ahead=2, prompt_tokens=16, harvest_tokens=1200, harvest_batch=4, context=64, features=24, score_batch=8, naive=2,
    policy_features=48, sentences=2, copies=2,
)  # fmt: skip
"""Sizes that a CPU gets through in seconds."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Where and how large."""

    device: str
    dtype: str
    """Of the models."""
    sizes: Sizes

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def model(self, shape: str) -> LanguageModel:
        """A model of a shape with random weights, made once."""
        return _model(shape, self.device, self.dtype)


@functools.lru_cache(maxsize=2)
def _model(shape: str, device: str, dtype: str) -> LanguageModel:
    model = random_model(shape, device, dtype)
    model.eos_ids = frozenset()  # no row ends early
    return model


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    rate: float
    unit: str
    over: dict[str, float] = field(default_factory=dict[str, float])
    """How many times as fast as others that were measured in the same turns."""
    of_floor: float | None = None
    """The rate over what the device's products or memory would allow."""
    more: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is measured, fails and is repeated by itself."""

    name: str
    measure: Callable[[int], Iterable[Row]]
    """Given a batch size, yields rows as they come."""
    batch: int
    """Rows side by side; halved where they do not fit in memory."""


Section = Callable[[Setup], Iterable[Part]]


class OutOfTime(BaseException):
    """The time of a section is over. Not an `Exception`, so that nothing on the way takes it for one of its own."""


def say(line: str) -> None:
    """On stderr, where it does not mix with the table."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` if what is inside takes longer; limits may lie in one another."""

    def end(_signal: int, _frame: object) -> None:
        raise OutOfTime

    began, left = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)[0]
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, min(seconds, left or seconds)))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - began)))


def run_section(name: str, parts: Sequence[Part], device: str, seconds: float) -> Iterator[Row]:
    """The rows of all parts. What fails is said in one line, and the next part goes on."""
    ends = time.monotonic() + seconds
    for place, part in enumerate(parts):
        left = ends - time.monotonic()
        if left <= 0:
            say(f"{name}: no time left for {', '.join(other.name for other in parts[place:])}")
            return
        yield from run_part(f"{name} {part.name}", part, device, left)
        free_memory(device)


def run_part(name: str, part: Part, device: str, seconds: float) -> Iterator[Row]:
    """The rows of one part, at half its batch where memory runs out."""
    batch, ends = part.batch, time.monotonic() + seconds
    while True:
        rows: list[Row] = []
        full = ""
        try:
            with time_limit(ends - time.monotonic()):
                rows.extend(part.measure(batch))
        except torch.OutOfMemoryError:
            full = held_memory(device)
        except OutOfTime:
            say(f"{name}: not done within its time")
        except Exception as error:
            say(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if not full:
            if batch < part.batch:
                if rows:
                    say(f"{name}: a batch of {batch} fits")
                for row in rows:
                    row.more["batch"] = batch
            yield from rows
            return
        free_memory(device)
        if batch == 1:
            say(f"{name}: out of memory with a batch of 1 ({full})")
            return
        say(f"{name}: out of memory with a batch of {batch} ({full}); again with {batch // 2}")
        batch //= 2


def held_memory(device: str) -> str:
    """How full the device is."""
    if torch.device(device).type != "cuda":
        return "of the host"
    free, total = torch.cuda.mem_get_info(device)
    return f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB in use"


def free_memory(device: str) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


class Peak:
    """Memory of the device at its highest in a block, in MiB above what was held before; None on a CPU."""

    def __init__(self, device: str) -> None:
        self.device, self.mib = device, None if torch.device(device).type != "cuda" else 0.0

    def __enter__(self) -> Peak:
        if self.mib is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.mib is not None:
            self.mib = round((torch.cuda.max_memory_allocated(self.device) - self._before) / 2**20, 1)
