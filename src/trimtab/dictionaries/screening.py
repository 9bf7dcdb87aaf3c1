"""The few large entries of z Wᵀ + b in full precision, found by way of a product in bfloat16.

Processors with matrix units for bfloat16 multiply in it several times as fast as in float32. How far such a product can
be off is known: with z = z̃ + δz and W_i = W̃_i + δW_i, where tildes are rounded,

    |z·W_i − z̃·W̃_i| ≤ ‖δz‖ ‖W_i‖ + ‖z̃‖ ‖δW_i‖,

and the errors of summation and of the rounded result are bounded as usual (Higham 2002, section 3.1). So candidates are
taken by the rounded product and computed anew in full precision. For entries above a floor, candidates are all that may
be above it. For the k largest, they are some more than k; a row is settled if its k-th largest is above all that the
others can be, and the few rows that are not settled are multiplied in full precision after all. What comes out is what
full precision alone would find, but for entries that are equal to rounding. The bounds are those of sums in float32, so
that a card is not let round them on the way (`float32_sums`).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from trimtab.dictionaries.encoding import DenseEncoder
from trimtab.dictionaries.precision import MATRIX_UNITS, float32_sums
from trimtab.dictionaries.sparse import (
    ActivePairs,
    SparseCodes,
    dot_pairs,
    dot_rows,
    fold_into_groups,
    largest,
    largest_places,
    members,
    true_counts,
    true_places,
)

CANDIDATES = 2
"""Candidates per entry that is wanted, at least `LEAST_EXTRA` more: more are rarely needed once an SAE is trained."""
LEAST_EXTRA = 16
DOT_COST = 20
"""How many times as long a product of two rows takes on its own as within a matrix product in float32."""
ALIGNED = 8
"""Columns of a rounded row come in multiples of this many: 16 bytes, which matrix units want."""
LEAST_FEATURES = 1024
"""Narrower dictionaries are not worth screening."""
UNIT = 2.0**-8
"""Relative error of rounding to bfloat16."""


class ScreenedFeatures(NamedTuple):
    """For every row the features whose rounded pre-activations are largest."""

    feature: Int[Tensor, "B m"]
    ceiling: Float[Tensor, " B"]
    """Above what every other feature of the row can be."""


def screening_is_fast(encoder: DenseEncoder) -> bool:
    """Whether a product in bfloat16 is much faster here than one in the float32 that is wanted, or was found to be."""
    W = encoder.W
    if not encoder.exact or W.dtype != torch.float32 or W.shape[0] < LEAST_FEATURES:
        return False
    return _has_matrix_units(W.device.type) if encoder.screened is None else encoder.screened


def screening_pays(encoder: DenseEncoder, k: int) -> bool:
    """Whether finding k features of a row by way of bfloat16 is faster here than a product in full precision."""
    few = (1 if encoder.screened else DOT_COST) * _count(k) < encoder.W.shape[0] // 2
    return few and screening_is_fast(encoder)


def largest_screened(encoder: DenseEncoder, z: Float[Tensor, "B d"], k: int) -> SparseCodes:
    """The k largest pre-activations of every row of encoder inputs z, in no particular order."""
    W, b = encoder.W, encoder.b
    found = Screen(W, b).candidates(z, _count(k), encoder.block_rows)
    exact = dot_rows(found.feature, z, W) + b[found.feature]
    values, which = exact.topk(k, dim=1, sorted=False)
    feature = found.feature.gather(1, which)
    open_rows = (~(values.amin(1) > found.ceiling)).nonzero().squeeze(1)
    for rows in open_rows.split(encoder.block_rows) if len(open_rows) else ():
        sure = largest(encoder(z[rows]), k).indices
        feature[rows] = sure
        values[rows] = dot_rows(sure, z[rows], W) + b[sure]
    return SparseCodes(values, feature)


def pairs_above_screened(
    encoder: DenseEncoder, z: Float[Tensor, "B d"], floor: float | Float[Tensor, " n"]
) -> ActivePairs | None:
    """The pre-activations of encoder inputs z above a floor (one for all features, or one for each), row after row;
    None if there are so many that screening does not pay."""
    W, b = encoder.W, encoder.b
    found = Screen(W, b - floor).candidates_above(z, W.shape[0] // (2 * DOT_COST), encoder.block_rows)
    if found is None:
        return None
    h = dot_pairs(found, z, W) + b[found.feature]
    return found._replace(value=h).where(h > (floor[found.feature] if isinstance(floor, Tensor) else floor))


class Screen:
    """An encoder rounded to bfloat16, and what the rounding can do to its products.

    The bias becomes two more columns, its rounded value and what that leaves; zeros fill up to a multiple of `ALIGNED`.
    """

    def __init__(self, W: Float[Tensor, "n d"], b: Float[Tensor, " n"]) -> None:
        self.n, self.d = W.shape
        d = self.d
        self.W = torch.zeros(self.n, -(-(d + 2) // ALIGNED) * ALIGNED, dtype=torch.bfloat16, device=W.device)
        self.W[:, :d] = W
        self.W[:, d] = b
        self.W[:, d + 1] = b - self.W[:, d]
        error = torch.linalg.vector_norm(W - self.W[:, :d], dim=1)
        self.W_norm, self.W_error = torch.linalg.vector_norm(W, dim=1).amax(), error.amax()
        self.b_max = b.abs().amax()

    def candidates(self, z: Float[Tensor, "B d"], count: int, block_rows: int) -> ScreenedFeatures:
        """The `count` features of every row whose rounded pre-activations are largest."""
        rounded = self._rounded(z)
        h = torch.empty(min(block_rows, len(z)), self.n, dtype=torch.bfloat16, device=z.device)
        features, edges = [], []
        for block in rounded.split(block_rows):
            with float32_sums(z.device):
                product = torch.mm(block, self.W.T, out=h[: len(block)])
            found = _largest_rounded(product, count)
            features.append(found.indices)
            edges.append(found.values.amin(1))
        edge = torch.cat(edges).float()
        return ScreenedFeatures(torch.cat(features), edge + UNIT * edge.abs() + self._error(z, rounded[:, : self.d]))

    def candidates_above(self, z: Float[Tensor, "B d"], most: int, block_rows: int) -> ActivePairs | None:
        """All entries that may be above 0; None if the first block has more than `most` of them a row.

        Everything is shifted up so far that what is compared is positive, and thus in the order of its bits.
        """
        rounded = self._rounded(z)
        error = self._error(z, rounded[:, : self.d])
        shift = float(2 * error.amax()) + torch.finfo(torch.float32).tiny
        shifted = self.W.clone()
        high, low = shifted[:, self.d], shifted[:, self.d + 1]
        bias = high.float() + low.float() + shift
        high.copy_(bias)
        low.copy_(bias - high)
        slack = UNIT**2 * (bias.abs().amax() + self.b_max) + 4 * torch.finfo(torch.float32).eps * shift * z.shape[1]
        least = ((shift - error - slack) / (1 + UNIT)).clamp_min(0).bfloat16().view(torch.int16) - 1
        h = torch.empty(min(block_rows, len(z)), self.n, dtype=torch.bfloat16, device=z.device)
        features, counts = [], [torch.zeros(1, dtype=torch.long, device=z.device)]
        for block, floor in zip(rounded.split(block_rows), least.split(block_rows), strict=True):
            with float32_sums(z.device):
                bits = torch.mm(block, shifted.T, out=h[: len(block)]).view(torch.int16)
            is_above = bits > floor[:, None]
            place = true_places(is_above)
            if not features and len(place) > most * len(block):
                return None
            row = place // self.n
            features.append(place - row * self.n)
            counts.append(true_counts(is_above, row))
        feature = torch.cat(features)
        return ActivePairs(z.new_empty(feature.shape), feature, torch.cat(counts).cumsum(0))

    def _rounded(self, z: Float[Tensor, "B d"]) -> BFloat16[Tensor, "B columns"]:
        rounded = torch.ones(len(z), self.W.shape[1], dtype=torch.bfloat16, device=z.device)
        rounded[:, : self.d] = z
        return rounded

    def _error(self, z: Float[Tensor, "B d"], rounded: BFloat16[Tensor, "B d"]) -> Float[Tensor, " B"]:
        """How far any product of a row can be off, but for the rounding of the product itself."""
        norm = torch.linalg.vector_norm(z, dim=1)
        rounding = torch.linalg.vector_norm(z - rounded, dim=1) * self.W_norm + norm * (1 + UNIT) * self.W_error
        summation = 4 * z.shape[1] * torch.finfo(torch.float32).eps * (norm * self.W_norm + self.b_max)
        return 1.001 * (rounding + summation + UNIT**2 * self.b_max)


def _largest_rounded(h: BFloat16[Tensor, "B n"], count: int) -> SparseCodes:
    """The largest entries of rows. On the CPU those below 0 count as equal, as nobody wants their features."""
    groups = fold_into_groups(h.shape[1], count)
    if h.device.type != "cpu" or groups is None or h.shape[1] // groups.size > 2**16:
        return largest(h, count)
    bits = h.view(torch.int16)  # ordered as the numbers are, from 0 up
    candidate = members(largest_places(bits.unflatten(1, groups).amax(1), count), groups)
    values = bits.gather(1, candidate)
    which = largest_places(values, count)
    return SparseCodes(values.gather(1, which).view(torch.bfloat16).clamp_min(0), candidate.gather(1, which))


def _count(k: int) -> int:
    return max(CANDIDATES * k, k + LEAST_EXTRA)


@cache
def _has_matrix_units(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability() >= MATRIX_UNITS
    return device == "cpu" and torch.cpu._is_amx_tile_supported()
