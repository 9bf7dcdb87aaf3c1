"""Figures of a benchmark: medians over repeats with their range, and how all of it is printed."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from machine import cpu_name


def medians(figures: Mapping[str, tuple[Sequence[float], int]]) -> dict[str, Any]:
    """The median of each figure, and behind them all each one's range.

    Args:
        figures: values of the repeats and digits, by name.
    """
    spreads = {name: spread(*given) for name, given in figures.items()}
    ranges = {f"{name}_range": found for name, found in spreads.items()}
    return {name: found["median"] for name, found in spreads.items()} | ranges


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, least and largest, rounded."""
    middle = statistics.median(values)
    return {"median": round(middle, digits), "min": round(min(values), digits), "max": round(max(values), digits)}


def measured_on(device: str = "cpu") -> dict[str, Any]:
    """The processor or accelerator, threads, load, and versions."""
    return {
        "device_name": cpu_name() if device == "cpu" else torch.cuda.get_device_name(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0], "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


def seconds(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """How long something takes on a device that does nothing else."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def product_rate(rows: int, weight: torch.Tensor, repeats: int = 5) -> float:
    """FLOP/s of the fastest way that torch has to multiply so many rows by a weight `[n, k]`."""
    x = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    ways: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(x, weight)]
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    best = min(seconds(way, weight.device) for way in ways for _ in range(1 + repeats))
    return 2 * rows * weight.numel() / best


def bandwidth(device: torch.device | str, mib: int = 512, repeats: int = 5) -> float:
    """Bytes per second that are read from a device's memory."""
    held = torch.ones(mib * 2**18, device=device)
    return held.nbytes / min(seconds(held.sum, device) for _ in range(1 + repeats))


def print_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    """One JSON object, or a line for each name."""
    if as_json:
        print(json.dumps(result))
        return
    width = max(map(len, result))
    for key, value in result.items():
        print(f"{key:>{width}}  {value}")
