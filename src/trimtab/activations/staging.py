"""Numbers on their way from where a model runs to CPU memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Staging:
    """Copies to CPU memory. From a card they run on a stream of their own, beside what is computed next; on a CPU they
    are made at once.

    Args:
        device: where the model's input goes; layers may be spread over several.
    """

    def __init__(self, device: torch.device) -> None:
        self.overlaps = device.type == "cuda"
        """Whether something else is worth doing before a copy is waited for."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def room(self, size: int) -> Tensor:
        """So many bytes of memory to copy into."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.overlaps)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Copy tensors into memory of `room`, once all of them are computed.

        Args:
            pairs: from and into. What is copied from may be dropped at once.

        Returns:
            What waits until all are there.
        """
        events: dict[torch.device, torch.cuda.Event] = {}
        for x, into in pairs:
            if x.device.type != "cuda":
                into.copy_(x)
                continue
            if x.device not in events:
                if x.device not in self._streams:
                    self._streams[x.device] = torch.cuda.Stream(x.device)
                self._streams[x.device].wait_stream(torch.cuda.current_stream(x.device))
                events[x.device] = torch.cuda.Event()
            stream = self._streams[x.device]
            x.record_stream(stream)  # its memory is not given to others before the copy is made
            with torch.cuda.stream(stream):
                into.copy_(x, non_blocking=True)
        for device, event in events.items():
            event.record(self._streams[device])

        def wait() -> None:
            for event in events.values():
                event.synchronize()

        return wait
