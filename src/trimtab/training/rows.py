"""Rows as trainings share them: samples drawn once, and batches read, moved and scaled once."""

from __future__ import annotations

import math
import threading
from collections import deque

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.activations import ActivationSource
from trimtab.errors import UserError
from trimtab.lm.transfers import to_device

DEPTH = 4
"""Batches of a stream that wait for the slowest of its trainings."""


class SiteRows:
    """The rows of one site: to train on and, if there are any, held out. Every sample is drawn once.

    Args:
        source: rows to train on.
        heldout: rows on which results are measured; without them, rows of `source`.

    Raises:
        UserError: the held-out rows have another width.
    """

    def __init__(self, source: ActivationSource, heldout: ActivationSource | None = None) -> None:
        if heldout is not None and heldout.d != source.d:
            raise UserError(
                f"held-out rows of width {heldout.d}",
                f"the training rows have width {source.d}",
                "harvest the same site",
            )
        self.source, self.heldout = source, heldout
        self._samples: dict[tuple[str, int, float], Tensor] = {}
        self._guard = threading.Lock()

    def sample(self, n: int, scale: float = 1.0) -> Float[Tensor, "m d"]:
        """Random training rows times a scale; the same tensor at every call. Raises a `UserError` unless they are
        finite."""
        return self._drawn(self.source, "the sample of rows", n, scale)

    def measured(self, n: int) -> Float[Tensor, "m d"]:
        """Random rows to measure on, held out if there are any; the same tensor at every call."""
        return self._drawn(self.heldout or self.source, "the held-out rows", n, 1.0)

    def forget(self) -> None:
        """Free the samples."""
        with self._guard:
            self._samples.clear()

    def _drawn(self, source: ActivationSource, what: str, n: int, scale: float) -> Tensor:
        with self._guard:
            if (what, n, 1.0) not in self._samples:
                self._samples[what, n, 1.0] = finite_rows(source.sample(n), what)
            if (what, n, scale) not in self._samples:
                self._samples[what, n, scale] = self._samples[what, n, 1.0] * scale
            return self._samples[what, n, scale]


class Batch:
    """One batch of a stream; scaled once for all that scale alike.

    Args:
        rows: where training computes; a copy may still be under way there.
        copied: when it will be done.
    """

    def __init__(self, rows: Float[Tensor, "B d"], copied: torch.cuda.Event | None = None) -> None:
        self.rows, self._copied = rows, copied
        self._scaled: dict[tuple[float, torch.dtype], Tensor] = {}

    def scaled(self, scale: float, dtype: torch.dtype) -> Float[Tensor, "B d"]:
        """The rows times a scale, to be read only."""
        if self._copied is not None:  # what is asked of the device from now on waits for the copy; the host does not
            stream = torch.cuda.current_stream(self.rows.device)
            stream.wait_event(self._copied)
            self.rows.record_stream(stream)
            self._copied = None
        key = scale, dtype
        if key not in self._scaled:
            self._scaled[key] = self.rows.to(dtype) * scale
        return self._scaled[key]


class Stream:
    """Batches of one source in their order from a step on, a few at a time, for trainings that are at different
    steps."""

    def __init__(self, source: ActivationSource, batch_size: int, steps: range, device: str | torch.device) -> None:
        self._batches = source.batches(batch_size, start_step=steps.start)
        self._kept: deque[Batch] = deque()
        self._first, self._stop, self._device = steps.start, steps.stop, torch.device(device)
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def read(self) -> bool:
        """Read one batch ahead, if there is room and need. Returns whether it did."""
        if len(self._kept) >= DEPTH or self._first + len(self._kept) >= self._stop:
            return False
        self._kept.append(self._moved(next(self._batches)))
        return True

    def batch(self, step: int) -> Batch | None:
        """The batch of a step; None if it has not been read yet."""
        place = step - self._first
        assert place >= 0, "this batch has been dropped"
        return self._kept[place] if place < len(self._kept) else None

    def _moved(self, rows: Float[Tensor, "B d"]) -> Batch:
        """The rows where training computes. To a CUDA device they are copied out of pinned memory, beside its steps."""
        if self._copies is None or rows.device.type != "cpu":
            return Batch(rows.to(self._device))
        with torch.cuda.stream(self._copies):
            there = to_device(rows, self._device)
            copied = torch.cuda.Event()
            copied.record(self._copies)
            return Batch(there, copied)

    def drop_before(self, step: int) -> None:
        """Free the batches that no training needs any more."""
        while self._kept and self._first < step:
            self._kept.popleft()
            self._first += 1


def input_scale(sample: Float[Tensor, "m d"], scaling: str) -> float:
    """The scalar that rows are multiplied by: E‖x‖ = √d (`sqrt_d`), E‖x‖² = 1 (`unit`), or 1 (`none`)."""
    norms = sample.double().norm(dim=1)
    if scaling == "none":
        return 1.0
    if not norms.any():
        raise UserError("the sample of rows", "all rows are zero, so that they cannot be scaled", "check the harvest")
    if scaling == "sqrt_d":
        return float(math.sqrt(sample.shape[1]) / norms.mean())
    return float(1 / norms.square().mean().sqrt())


def finite_rows(rows: Float[Tensor, "m d"], what: str) -> Float[Tensor, "m d"]:
    """`rows`, if all are finite; a `UserError` otherwise."""
    if count := int((~rows.isfinite().all(1)).sum()):
        raise bad_rows(count, len(rows), what)
    return rows


def bad_rows(count: int, of: int, what: str) -> UserError:
    """What to raise where some rows are not finite."""
    return UserError(f"{count} of {of} rows in {what}", "they hold NaN or infinity", "harvest the site again")
