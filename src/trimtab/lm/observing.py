"""What is shown of decoding while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

Observe = Callable[[Int[Tensor, " B"], int, Float[Tensor, "B V"]], None]
"""Called at each choice with the unfinished rows of a batch, how many tokens each had chosen, and their logits, which
stay as they are and may be kept."""


@runtime_checkable
class StepRecorder(Protocol):
    """Keeps what each choice was made from, also of steps that are taken before they are looked at."""

    def watching(self) -> AbstractContextManager[object]:
        """Entered around each forward pass, before its edits."""
        ...

    def seen(self, rows: int) -> Sequence[Tensor]:
        """What the last pass gave of each of so many rows, `[B, …]` each; tensors that were there, or made of them
        without asking the device for anything."""
        ...

    def keep(
        self, rows: Int[Tensor, " B"], step: int, logits: Float[Tensor, "B V"] | None, seen: Sequence[Tensor]
    ) -> None:
        """Keep a choice.

        Args:
            rows, step, logits: as for `Observe`; no logits of steps that were taken ahead.
            seen: what `seen` gave of these rows, which may be kept.
        """
        ...
