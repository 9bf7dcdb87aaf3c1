"""What torch's profiler counts on a CUDA device: kernels that are launched, graphs, and waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

LAUNCHES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"}
GRAPHS = {"cudaGraphLaunch"}
WAITS = {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"}


class Event(Protocol):
    """As much as is read of the profiler's averages."""

    @property
    def key(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def self_device_time_total(self) -> float: ...


class Counts(NamedTuple):
    """Per step, or in all."""

    launches: float
    graphs: float
    waits: float
    device_ms: float
    """Time that kernels took."""


def counted(events: Iterable[Event]) -> Counts:
    """Sums of the profiler's averages."""
    launches = graphs = waits = 0
    microseconds = 0.0
    for event in events:
        launches += event.count * (event.key in LAUNCHES)
        graphs += event.count * (event.key in GRAPHS)
        waits += event.count * (event.key in WAITS)
        microseconds += event.self_device_time_total
    return Counts(launches, graphs, waits, microseconds / 1e3)


def per_step(run: Callable[[], object], steps: int = 1) -> Counts:
    """What a run does on its CUDA device, shared out among its steps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    return Counts(*(round(value / steps, 3) for value in counted(profiler.key_averages())))
