"""Where sparse steps stop paying: the products of a step over the active pairs, as a list and as a table.

Both executions of `dictionaries/active.py` get the same pre-activations and the same pairs, a random share of all. A
step of a penalised SAE needs, beyond the encoder's product, one decoding with its derivative and two collections.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from figures import seconds
from torch import Tensor

from sae_training.turns import spread
from trimtab.dictionaries.active import DENSE_ABOVE, Active, DensePairs, SparsePairs
from trimtab.dictionaries.sparse import ActivePairs

DENSITIES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2)


def measure_density(options: argparse.Namespace, _folder: Path, *, d: int = 576, n: int = 8192) -> dict[str, object]:
    """Seconds of both executions at each density, in turn, and the density at which they take equally long."""
    torch.set_num_threads(options.threads)
    d, n = (d // 8, n // 8) if options.quick else (d, n)
    rows = min(options.batch, 1024)
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(size, d, generator=generator).to(options.device) for size in (rows, n))
    h = torch.rand(rows, n, generator=generator).to(options.device)
    times: dict[float, dict[str, float]] = {}
    for density in DENSITIES:
        mask = h > 1 - density
        row, feature = mask.nonzero().unbind(1)
        start = torch.cat([row.new_zeros(1), mask.sum(1).cumsum(0)])
        pairs = ActivePairs(h[row, feature], feature, start)
        own = h.clone()  # it is masked in place
        ways = {
            "sparse": lambda pairs=pairs: _step(SparsePairs(pairs, n), x, W),
            "dense": lambda mask=mask, own=own: _step(DensePairs(own, mask), x, W),
        }
        for way in ways.values():
            way()
        turns = [
            {name: seconds(way, options.device) for name, way in ways.items()} for _ in range(options.density_repeats)
        ]
        times[density] = {name: spread([turn[name] for turn in turns]).median for name in ways}
        times[density]["dense_over_sparse"] = spread([turn["dense"] / turn["sparse"] for turn in turns]).median
    return {
        "density.crossover": _crossover({density: t["dense_over_sparse"] for density, t in times.items()}),
        "density.switch": DENSE_ABOVE,
        "density": {"d": d, "n": n, "rows": rows, "seconds": {str(density): t for density, t in times.items()}},
    }


def density_table(found: dict[str, object]) -> str:
    """The figures as Markdown."""
    density = found["density"]
    assert isinstance(density, dict)
    lines = [
        f"\n### sparse and dense execution: d {density['d']}, n {density['n']}, {density['rows']} rows\n",
        "| share of active pairs | sparse, ms | dense, ms | dense over sparse |",
        "| --- | --- | --- | --- |",
    ]
    for share, t in density["seconds"].items():
        lines.append(
            f"| {100 * float(share):.1f}% | {1e3 * t['sparse']:.1f} | {1e3 * t['dense']:.1f} "
            f"| {t['dense_over_sparse']:.2f} |"
        )
    lines.append(f"\nEqual at {found['density.crossover']}; trimtab switches at {found['density.switch']}.")
    return "\n".join(lines)


def _step(active: Active, x: Tensor, W: Tensor) -> None:
    decoding = active.decode(active.h, W)
    error = decoding.x - x
    by_h = decoding.dot(error)
    active.collect(active.h, error)
    active.collect(by_h, x)


def _crossover(ratio: dict[float, float]) -> float | None:
    """The density at which the ratio passes 1, interpolated between the densities around it."""
    shares = sorted(ratio)
    for low, high in itertools.pairwise(shares):
        if ratio[low] >= 1 > ratio[high]:
            return round(low + (high - low) * (ratio[low] - 1) / (ratio[low] - ratio[high]), 4)
    return None
