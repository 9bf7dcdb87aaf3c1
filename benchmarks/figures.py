"""Figures of a benchmark: the device it runs on and its floors, times, medians with their range, how all is printed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from machine import cpu_name

from trimtab.errors import UserError
from trimtab.lm.loading import DTYPES, check_device

PRODUCT = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the square product that tells how fast a device multiplies."""


def device_options(parser: argparse.ArgumentParser, *, dtype: bool = True) -> None:
    """Add `--device` and, where a model or SAE may be in several, `--dtype`."""
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, …")
    if dtype:
        parser.add_argument("--dtype", default="float32", choices=[*DTYPES], help="of the model's weights")


def arguments(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says. A device that is not there ends the program with one line."""
    args = parser.parse_args(words)
    try:
        check_device(args.device)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error.line}\n")
    return args


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


def measured_on(device: torch.device | str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    """The processor or accelerator and its floors, threads, load, and versions."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": str(device), "device_name": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "floors": floors(device, dtype), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0], "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


class Taken(NamedTuple):
    """Seconds that something took."""

    wall: float
    cpu: float
    """Of the processor, all threads together: other work on the machine disturbs it less."""


def timed(run: Callable[[], object], device: torch.device | str = "cpu") -> Taken:
    """How long something takes on a device that does nothing else."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def seconds(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """`timed` by the clock."""
    return timed(run, device).wall


def in_turn(
    arms: Mapping[str, Callable[[], object]], repeats: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each arm in every round, whose order is reversed every other time."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name in list(arms) if repeat % 2 == 0 else list(arms)[::-1]:
            times[name].append(seconds(arms[name], device))
    return times


def floors(device: torch.device | str, dtype: str = "float32") -> dict[str, Any]:
    """What a device reaches that does nothing else: gigabytes read and gigaflops multiplied per second.

    On an accelerator products are measured in float32, TF32 and bfloat16, too.
    """
    kind = torch.device(device).type
    size, rates = PRODUCT.get(kind, PRODUCT["cuda"]), {}
    for name in dict.fromkeys([dtype, *(("float32", "tf32", "bfloat16") if kind == "cuda" else ())]):
        weight = torch.randn(size, size, device=device).to(DTYPES["float32" if name == "tf32" else name])
        with tf32_products(name == "tf32"):
            rates[name] = round(product_rate(size, weight) / 1e9, 1)
    return {"gigabytes_per_second": round(bandwidth(device) / 1e9, 1), "gigaflops_per_second": rates}


@contextmanager
def tf32_products(on: bool) -> Iterator[None]:
    """Let an accelerator multiply float32 in TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


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
