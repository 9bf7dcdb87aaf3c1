"""What a step leaves on its device, so that it need not wait there: sums of its numbers, the first step that was not
finite, and how long steps took.

On a CPU all of it is at hand at once; on an accelerator it is fetched every now and then (`looks_late`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries.topk_like import looks_late


class Fault(NamedTuple):
    """A step whose loss or gradient norm is not finite."""

    step: int
    loss: float
    grad_norm: float
    bad_rows: int
    """Rows of its batch that hold NaN or infinity."""


class FirstFault:
    """The first step that was not finite.

    Args:
        device: where steps are taken.
        step: the first that will be noted.

    Attributes:
        seen: whether there was one, as a tensor on the device.
    """

    def __init__(self, device: torch.device, step: int = 0) -> None:
        device = _kept_on(device)
        self.seen = torch.zeros((), dtype=torch.bool, device=device)
        self._facts = torch.zeros(len(Fault._fields), dtype=torch.float64, device=device)
        self._step = torch.full_like(self._facts[0], step)

    @property
    def state(self) -> list[Tensor]:
        """All that a step changes, in place."""
        return [self.seen, self._facts, self._step]

    def note(self, loss: Float[Tensor, ""], grad_norm: Float[Tensor, ""], rows: Float[Tensor, "B d"]) -> None:
        """Keep the next step's numbers if it is the first that was not finite."""
        is_bad = ~(loss.isfinite() & grad_norm.isfinite())
        if looks_late(rows.device) or is_bad:
            bad_rows = (~rows.isfinite().all(1)).sum()
            kept = [self._kept(number) for number in (loss, grad_norm, bad_rows)]
            is_bad = is_bad.to(self.seen.device)
            self._facts.copy_(torch.where(self.seen | ~is_bad, self._facts, torch.stack([self._step, *kept])))
            self.seen |= is_bad
        self._step += 1

    def _kept(self, number: Tensor) -> Tensor:
        return number.to(self.seen.device).double()

    def found(self) -> Fault | None:
        """The first fault until now, if there was one; waits for the device."""
        if not self.seen:
            return None
        step, loss, grad_norm, bad_rows = self._facts.tolist()
        return Fault(int(step), loss, grad_norm, int(bad_rows))


class Sums:
    """Sums of a step's numbers over steps, in float64.

    Args:
        names: of the numbers.
        device: where they are.
        start: what `read` gave before; from nothing where it is empty.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device, start: Mapping[str, float] | None = None) -> None:
        self.names, start = names, start or {}
        totals = torch.tensor([start.get(name, 0.0) for name in (*names, "steps")], dtype=torch.float64)
        self._totals = totals.to(_kept_on(device))

    @property
    def state(self) -> list[Tensor]:
        """All that a step changes, in place."""
        return [self._totals]

    def add(self, numbers: Mapping[str, Float[Tensor, ""] | float]) -> None:
        """Add a step's numbers."""
        zero = torch.zeros_like(self._totals[0])
        each = [*(numbers[name] for name in self.names), 1.0]
        self._totals += torch.stack([zero + (x.to(zero.device) if isinstance(x, Tensor) else x) for x in each])

    def clear(self) -> None:
        """Begin anew."""
        self._totals.zero_()

    def read(self) -> dict[str, float]:
        """The sums by name, and the number of `steps`; waits for the device."""
        *totals, steps = self._totals.tolist()
        return {"steps": int(steps), **dict(zip(self.names, totals, strict=True))}


def _kept_on(device: torch.device) -> torch.device:
    """Where numbers in float64 are kept: MPS has none."""
    return torch.device("cpu") if device.type == "mps" else device


class Clock:
    """Adds up how long steps take: on a CUDA device until they are done there, which the host does not wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count the time of what is done within."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self._device)
            begin.record(stream)
            yield
            end.record(stream)
            self._open.append((begin, end))
            return
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """All until now; waits for the device."""
        for begin, end in self._open:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._open.clear()
        return self._seconds
