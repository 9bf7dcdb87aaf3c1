"""Each kernel beside torch's operations for the same, and beside the memory that is read and written at least once.

What is written over its input is given a copy of it each time, which both sides make and the floor counts. Without a
CUDA device, or without Triton, both sides are torch's.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from figures import bandwidth, in_turn
from shapes import SHAPES
from torch import Tensor

from accelerator.sections import Part, Row, Setup
from trimtab.dictionaries.architectures.topk import TopKConfig, TrainableTopK
from trimtab.dictionaries.sparse import (
    SparseCodes,
    collect_rows,
    decode_pairs,
    dot_pairs,
    keep_largest,
    largest,
    order_by_feature,
)
from trimtab.kernels import KERNELS, kernel_for
from trimtab.lm.sampling import nucleus, nucleus_floor

TOP_P = 0.9


class Work(NamedTuple):
    """What one kernel does, as it is asked for."""

    kernel: str
    what: str
    run: Callable[[], object]
    rows: int
    bytes: int
    """Of all that is read and written, each once."""
    sort: Callable[[], object] | None = None
    """Another way."""


def parts(setup: Setup) -> Iterable[Part]:
    """A part for each group of kernels that share their tables."""
    sizes = setup.sizes
    for name, make, batch in (
        ("largest", largest_work, sizes.batch),
        ("products", product_work, sizes.batch),
        ("unit rows", unit_work, sizes.batch),
        ("nucleus", nucleus_work, sizes.rows[0]),
    ):
        yield Part(name=name, measure=functools.partial(measured, setup, make), batch=batch)


def measured(setup: Setup, make: Callable[[Setup, int], Iterable[Work]], batch: int) -> Iterator[Row]:
    """Rows per second of each kernel, over torch and other ways in the same turns."""
    sizes, device = setup.sizes, setup.device
    speed = bandwidth(device)
    for work in make(setup, batch):
        several = functools.partial(_several, work.run, sizes.turn_steps)
        arms = {"own": several, "torch": functools.partial(_by_torch, several)}
        if work.sort is not None:
            arms["sort"] = functools.partial(_several, work.sort, sizes.turn_steps)
        for arm in arms.values():
            arm()
        times = in_turn(arms, sizes.repeats, device)
        own = times.pop("own")
        seconds = statistics.median(own) / sizes.turn_steps
        has_kernel = kernel_for(work.kernel, torch.zeros(1, device=device)) is not None
        yield Row(
            what=work.what, rate=work.rows / seconds, unit="rows/s",
            over={
                name: statistics.median(b / a for a, b in zip(own, taken, strict=True)) for name, taken in times.items()
            },
            of_floor=work.bytes / speed / seconds, more={"us": round(1e6 * seconds, 1), "kernel": has_kernel},
        )  # fmt: skip


def largest_work(setup: Setup, batch: int) -> Iterator[Work]:
    """A TopK step's, with AuxK's."""
    n, k, device = setup.sizes.n, setup.sizes.k, setup.device
    for dtype in (torch.float32, torch.bfloat16):
        h = torch.randn(batch, n, device=device).to(dtype)
        what = f"{k} largest of {n}, {dtype}".replace("torch.", "")
        listed = h.nbytes + batch * k * (h.element_size() + 8)
        yield Work("largest_in_rows", what, functools.partial(largest, h, k), batch, listed)
    h = torch.randn(batch, n, device=device)
    for count in (k, min(setup.sizes.d // 2, n)):
        run = functools.partial(_keep_largest, h, count)
        yield Work("keep_largest_in_rows", f"{count} of {n} kept in a copy", run, batch, 4 * h.nbytes)


def product_work(setup: Setup, batch: int) -> Iterator[Work]:
    """Decoding k of n features, and its gradients."""
    d, n, k, device = setup.sizes.d, setup.sizes.n, setup.sizes.k, setup.device
    W, X = torch.randn(n, d, device=device), torch.randn(batch, d, device=device)
    pairs = SparseCodes(*largest(torch.randn(batch, n, device=device), k)).pairs()
    order = order_by_feature(pairs, n)
    listed = pairs.value.nbytes + pairs.feature.nbytes
    for kernel, what, run in (
        ("weighted_bags", f"{k} of {n} decoded", lambda: decode_pairs(pairs, W)),
        ("weighted_bags", f"{k} of {n} collected", lambda: collect_rows(order, pairs.value, X)),
        ("bag_dots", f"{k} of {n} dot products", lambda: dot_pairs(pairs, X, W)),
    ):
        yield Work(kernel, what, run, batch, W.nbytes + X.nbytes + listed)


def unit_work(setup: Setup, batch: int) -> Iterator[Work]:
    """What keeps a decoder's rows at norm 1."""
    sizes = setup.sizes
    sae = TrainableTopK(TopKConfig(n_features=sizes.n, k=sizes.k), sizes.d).to(setup.device)
    W = sae.W_dec
    W.grad = torch.randn_like(W)
    what = f"rows of {sizes.n} × {sizes.d}"
    yield Work("remove_along_rows", f"gradients of {what}", sae.project_gradients, sizes.n, 3 * W.nbytes)
    yield Work("divide_rows_by_norm", f"norms of {what}", sae.constrain, sizes.n, 2 * W.nbytes)


def nucleus_work(setup: Setup, batch: int) -> Iterator[Work]:
    """Of as many tokens as each model has."""
    for shape in setup.sizes.shapes:
        size = SHAPES[shape].vocab_size
        probs = torch.softmax(3 * torch.randn(batch, size, device=setup.device), dim=-1)
        yield Work(
            "nucleus_floor", f"nucleus of {size} tokens", functools.partial(nucleus_floor, probs, TOP_P), batch,
            probs.nbytes, functools.partial(nucleus, probs, TOP_P, size),
        )  # fmt: skip


def _keep_largest(h: Tensor, k: int) -> Tensor:
    return keep_largest(h.clone(), k)


def _by_torch(run: Callable[[], object]) -> object:
    with mock.patch.dict(KERNELS, clear=True):
        return run()


def _several(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()
