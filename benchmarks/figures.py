"""Figures of a benchmark: medians over repeats with their range, and how all of it is printed."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
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


def print_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    """One JSON object, or a line for each name."""
    if as_json:
        print(json.dumps(result))
        return
    width = max(map(len, result))
    for key, value in result.items():
        print(f"{key:>{width}}  {value}")
