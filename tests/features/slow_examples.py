"""Examples the slow way: every row is kept, and each feature sorts all that it fires on."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch

from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.feature_examples import KINDS
from trimtab.lm.sampling import uniform


class Chosen(NamedTuple):
    document: int
    position: int
    tokens: list[int | None]
    activations: list[float]


def all_examples(
    rows: dict[str, Any],
    sae: Dictionary,
    counts: tuple[int, int, int],
    window: int,
    seed: int,
    unit: torch.Tensor | float = 1.0,
) -> dict[tuple[int, str], list[Chosen]]:
    """What each feature keeps of each kind; of equal keys the earlier place comes first.

    Args:
        rows: `x [R, d]` and `token`, `document`, `position`, `slot`, in any order.
        counts: windows of each kind.
        unit: what a code of 1 comes to in the model, `[R, 1]` if it differs from row to row.
    """
    f = (sae.encode(rows["x"]) * sae.W_dec.norm(dim=1) * unit).tolist()
    stretches: defaultdict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    columns = (rows[name].tolist() for name in ("document", "position", "slot"))
    for row, (document, position, slot) in enumerate(zip(*columns, strict=True)):
        stretches[document, position - slot][position] = row
    found: dict[tuple[int, str], list[Chosen]] = {}
    before = window * 2 // 3
    for feature in range(sae.n_features):
        for stream, (kind, count) in enumerate(zip(KINDS, counts, strict=True), start=16):
            where = (rows["document"], np.full(len(f), feature), rows["position"])
            draws = uniform(seed, *(torch.as_tensor(part.astype(np.int64)) for part in where), stream).tolist()
            best: list[tuple[float, int, int, dict[int, int]]] = []
            for (document, _), places in stretches.items():
                keys: list[tuple[float, int]] = []
                for position, row in sorted(places.items()):
                    a = f[row][feature]
                    if a > 0:
                        u = draws[row]
                        keys.append(({"top": a, "weighted": math.log1p(-u) / a, "random": u}[kind], -position))
                if keys:
                    key, at = max(keys)
                    best.append((key, document, -at, places))
            best.sort(key=lambda one: (-one[0], one[1], one[2]))
            found[feature, kind] = [
                Chosen(
                    document,
                    position,
                    [int(rows["token"][places[p]]) if p in places else None for p in around(position, before, window)],
                    [f[places[p]][feature] if p in places else 0.0 for p in around(position, before, window)],
                )
                for _, document, position, places in best[:count]
            ]
    return found


def around(position: int, before: int, window: int) -> range:
    return range(position - before, position - before + window)
