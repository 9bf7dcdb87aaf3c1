"""How a bank should use the processor: members side by side or one after the other, encoder products apart or stacked.

Rows are random; sparsity is by construction (TopK), so that steps cost what they cost on real rows. The two ways of a
pair take turns, and the table holds the median of the ratios. `--counts` counts what matters on a card instead: the
operations of a dense step, which the host would launch one by one, and the tiles of the encoder's product of one
member, of which each multiprocessor wants one at least.

    python benchmarks/bank_batching.py [--d 576] [--features 8192] [--members 4] [--json]
    python benchmarks/bank_batching.py --counts
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from figures import arguments, device_options, floors, seconds
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.runs import Run
from trimtab.training import SiteRows, Threads, TrainConfig, Training, train_all
from trimtab.training.rows import Batch
from trimtab.training.trainer import Trainer

MULTIPROCESSORS = 132
"""Of an H100 or H200."""
TILE = 128
"""Rows and columns of what one multiprocessor computes at once of a large product."""
NO_WORK = {"detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense"}


class RandomRows:
    """The same few batches again and again, so that reading costs nothing."""

    def __init__(self, d: int, rows: int) -> None:
        self.rows = torch.randn(rows, d, generator=torch.Generator().manual_seed(0))
        self.d, self.rows_total = d, rows
        self.description: dict[str, object] = {"kind": "random"}

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Tensor]:
        whole = len(self.rows) // batch_size
        while True:
            place = start_step % whole * batch_size
            yield self.rows[place : place + batch_size]
            start_step += 1

    def sample(self, n: int) -> Tensor:
        return self.rows[:n]


def encoder_products(d: int, n: int, members: int, batch: int, device: str) -> dict[str, Callable[[], object]]:
    """The first product of a step for all members: one after the other in blocks of rows, whole, and as one."""
    x = torch.randn(batch, d, device=device)
    weights = [torch.randn(n, d, device=device) for _ in range(members)]
    stacked = torch.cat(weights)

    def blocked() -> None:
        for W in weights:
            for block in x.split(512):
                F.linear(block, W)

    return {
        "blocks of 512 rows, member by member": blocked,
        "member by member": lambda: [F.linear(x, W) for W in weights],
        "all members stacked": lambda: F.linear(x, stacked),
    }


def bank_steps(d: int, n: int, members: int, batch: int, steps: int, threads: Threads, device: str) -> float:
    """Seconds for some steps of a bank of TopK SAEs, without start and end."""
    config = TrainConfig(
        n_features=n, k=32, rows=steps * batch, batch_size=batch, sample_rows=64, heldout_rows=64, b_dec_init="zeros"
    )
    rows = SiteRows(RandomRows(d, 4 * batch))
    with tempfile.TemporaryDirectory() as directory:
        runs = [Run.open(Path(directory) / str(i), "train", {}) for i in range(members)]
        trainings = [Training(config, rows, run) for run in runs]
        took = seconds(lambda: train_all(trainings, threads=threads, device=device), device)
        for training in trainings:
            training.run.close()
            if training.error is not None:
                raise training.error
    return took


class Operations(TorchDispatchMode):
    """Counts operations that compute something: views and empty memory do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not is_view and func.overloadpacket.__name__ not in NO_WORK
        return func(*args, **(kwargs or {}))


def operations(architecture: str) -> int:
    """Of a dense step, the third of a training; their number does not depend on sizes."""
    config = TrainConfig(arch=architecture, n_features=128, l0=4, rows=64_000, batch_size=64, sample_rows=64)
    rows = SiteRows(RandomRows(16, 256))
    with tempfile.TemporaryDirectory() as directory, Run.open(Path(directory) / "run", "train", {}) as run:
        trainer = Trainer.start(config, rows, run)
        trainer.sae.execution = "dense"
        batches = rows.source.batches(64)
        for _ in range(2):
            trainer.advance(Batch(next(batches)))
        with Operations() as counted:
            trainer.advance(Batch(next(batches)))
    return counted.count


def tiles(batch: int, n: int) -> int:
    """Of the encoder's product of one member."""
    return math.ceil(batch / TILE) * math.ceil(n / TILE)


def counts() -> dict[str, dict[str, int]]:
    """What `--counts` prints."""
    sizes = [(4096, 16_384), (4096, 8192), (2048, 4096), (1024, 8192), (1024, 2048), (1024, 1024)]
    return {
        "operations of a dense step": {name: operations(name) for name in TRAINABLE},
        f"tiles, for {MULTIPROCESSORS} multiprocessors": {f"batch {b}, n {n}": tiles(b, n) for b, n in sizes},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--d", type=int, default=576, help="width of a row")
    parser.add_argument("--features", type=int, default=8192, help="features of each member")
    parser.add_argument("--members", type=int, default=4, help="members of the bank")
    parser.add_argument("--batch", type=int, default=1024, help="rows of a batch")
    parser.add_argument("--steps", type=int, default=10, help="steps of a bank")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    device_options(parser, dtype=False)
    parser.add_argument("--counts", action="store_true", help="count operations and tiles, and measure nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = arguments(parser)
    if options.counts:
        found_counts = counts()
        if options.json:
            print(json.dumps(found_counts))
            return
        for what, numbers in found_counts.items():
            print(what)
            for name, number in numbers.items():
                print(f"{number:6,} {name}")
        return
    cores = torch.get_num_threads()
    size = (options.d, options.features, options.members, options.batch)

    products = encoder_products(*size, options.device)
    ways = {name: (lambda work=work: seconds(work, options.device)) for name, work in products.items()}
    steps = {
        f"{way.workers} side by side, {way.each} threads each": (
            lambda way=way: bank_steps(*size, options.steps, way, options.device)
        )
        for way in ([Threads(1, cores), Threads(cores, 1)] if options.device == "cpu" else [Threads(1, cores)])
    }
    found: dict[str, float] = {}
    for group in (ways, steps):
        for way in group.values():
            way()  # once for nothing
        times = [{name: way() for name, way in group.items()} for _ in range(options.repeats)]
        first = next(iter(group))
        found |= {name: statistics.median(turn[first] / turn[name] for turn in times) for name in group}
    if options.json:
        print(json.dumps({"cores": cores, **vars(options), "speed": found, "floors": floors(options.device)}))
        return
    print(f"{cores} threads, d {options.d}, n {options.features}, {options.members} members, batch {options.batch}")
    for name, ratio in found.items():
        print(f"{ratio:6.2f} × {name}")
    print(f"floors: {floors(options.device)}")


if __name__ == "__main__":
    main()
