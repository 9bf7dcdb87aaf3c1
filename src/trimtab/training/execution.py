"""Which execution of a step is faster on an accelerator: measured once for each kind of step, on the rows at hand.

On a CPU the share of active pairs decides, by constants that were measured there (`dictionaries.active`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries.active import Execution
from trimtab.dictionaries.precision import float32_products
from trimtab.dictionaries.trainable import TrainableSAE
from trimtab.lm.captured import WARM, Captured

Timer = Callable[[Callable[[], object]], float]
"""Gives the seconds that something takes."""
TURNS = 3
"""Times that each execution is timed; the shortest counts."""
_FOUND: dict[tuple[object, ...], Execution] = {}
"""What was measured in this process."""


def is_measured(sae: TrainableSAE) -> bool:
    """Whether the execution of an SAE's steps is to be measured, once there are rows."""
    return sae.b_dec.device.type == "cuda" and sae.execution is None and sae.is_written_out


def fastest_execution(sae: TrainableSAE, x: Float[Tensor, "B d"], timer: Timer | None = None) -> Execution:
    """The execution by which an SAE's gradients on these rows are there first, waits included.

    One that a training would replay as a graph is timed so. It is measured once in a process for a device, an
    architecture, sizes, sparsity and precision. One that needs more memory than there is loses. State and rows stay as
    they are; gradients do not.

    Args:
        sae: to be trained, prepared for a step.
        x: a batch, scaled.
        timer: for tests.

    Raises:
        torch.OutOfMemoryError: there is not enough memory for any.
    """
    config, device = sae.config, x.device
    sparsity = getattr(config, "k", None), getattr(config, "l0", None), getattr(config, "sparsity_weight", None)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    key = (where, sae.architecture, config.n_features, *x.shape, x.dtype, sparsity, sae.precision)
    if key not in _FOUND:
        _FOUND[key] = _measured(sae, x, timer or _seconds_on(device))
    return _FOUND[key]


def _measured(sae: TrainableSAE, x: Tensor, timer: Timer) -> Execution:
    ways: list[Execution] = ["dense", "sparse"]
    if sae.precision == "fp32":
        ways.append("screened")
    seconds: dict[Execution, float] = {}
    before, said = sae.execution, ""
    with float32_products(sae.precision, x.device):
        for way in ways:
            sae.execution = way
            try:
                seconds[way] = _shortest(sae, x, timer)
            except torch.OutOfMemoryError as error:
                said = str(error)  # the error itself holds what was computed
            sae.zero_grad(set_to_none=True)
            if x.device.type == "cuda":
                torch.cuda.empty_cache()
    sae.execution = before
    if not seconds:
        raise torch.OutOfMemoryError(said)
    return min(seconds, key=seconds.__getitem__)


def _shortest(sae: TrainableSAE, x: Tensor, timer: Timer) -> float:
    """The seconds that gradients take, by a graph where steps are replayed as one."""
    captured = Captured(x.device, f"the measuring of {sae.architecture} SAEs")

    def gradients() -> None:
        sae.gradients(x)

    def work() -> None:
        captured(gradients, replay=not sae.waits, proven=lambda _: True)  # its numbers are of no use

    for _ in range(WARM + 1):  # memory, kernels and the graph are there then
        work()
    return min(timer(work) for _ in range(TURNS))


def _seconds_on(device: torch.device) -> Timer:
    def seconds(work: Callable[[], object]) -> float:
        torch.accelerator.synchronize(device)
        began = time.perf_counter()
        work()
        torch.accelerator.synchronize(device)
        return time.perf_counter() - began

    return seconds
