"""How alike the rows of a decoder are: the coherence of a dictionary (Donoho and Elad 2003), and its mean.

Features of a dictionary without redundancy have no near neighbour; duplicates show as cosines near 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK_BYTES = 16 << 20
"""Size of the block of cosines that is held at once."""


class Coherence(NamedTuple):
    """|cos| between different decoder rows. A row of zeros has cosine 0 with all."""

    mean: float
    """Mean over features of |cos| with the nearest other feature."""
    max: float
    """|cos| of the nearest pair: the dictionary's coherence."""
    pair: tuple[int, int]
    """That pair."""


@torch.no_grad()
def decoder_coherence(directions: Float[Tensor, "n d"]) -> Coherence:
    """Compare every unit decoder row with every other, a block of rows at a time; with one alone a `ValueError`."""
    n = len(directions)
    if n < 2:
        raise ValueError("a nearest neighbour needs two features")
    directions = directions.float()
    rows = max(1, _BLOCK_BYTES // (4 * n))
    nearest, neighbour = [], []
    for start in range(0, n, rows):
        cosine = (directions[start : start + rows] @ directions.T).abs_()
        own = torch.arange(len(cosine), device=cosine.device)
        cosine[own, own + start] = -1
        found = cosine.max(dim=1)
        nearest.append(found.values)
        neighbour.append(found.indices)
    value, other = torch.cat(nearest).clamp_(0, 1), torch.cat(neighbour)
    first = int(value.argmax())
    return Coherence(float(value.double().mean()), float(value[first]), (first, int(other[first])))
