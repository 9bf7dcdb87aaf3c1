"""The active (row, feature) pairs of a batch, those above a floor, and the products that a training step needs of them.

Two executions of the same interface: `SparsePairs` touches the pairs only, `DensePairs` takes all features of all rows.
Sparse products cost more per pair, so that above some density dense ones are faster; on a CPU `active_above` switches
there. On an accelerator a list of pairs has to be waited for as well, so that a training measures which is faster. An
architecture's gradients are written once, for both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.dictionaries.encoding import DenseEncoder
from trimtab.dictionaries.precision import Precision, product
from trimtab.dictionaries.screening import pairs_above_screened, screening_is_fast
from trimtab.dictionaries.sparse import (
    ActivePairs,
    FeatureOrder,
    collect_rows,
    decode_pairs,
    dot_pairs,
    order_by_feature,
    true_counts,
    true_places,
)

Execution = Literal["sparse", "screened", "dense"]
"""How a step is computed: from a list of the active pairs, from one that is found by way of bfloat16
(`dictionaries.screening`), or from all features."""
DENSE_ABOVE = 0.06
"""Share of active pairs above which dense products are faster, on two CPU cores (`benchmarks/train_sae.py`)."""

Values = Tensor
"""One number per pair: `[m]` for sparse pairs, `[B, n]` for dense ones. Values of different pairs never mix, so that
elementwise operations mean the same for both; what stands in a dense table outside the active pairs is ignored, and may
be set to 0 by whatever takes the table: a copy of it would cost more than a product on a few cores."""


class Decoding(NamedTuple):
    """A reconstruction and the derivative that goes with it."""

    x: Float[Tensor, "B d"]
    """Σ_i v[b, i] W[i]."""
    dot: Callable[[Float[Tensor, "B d"]], Values]
    """G ↦ G[b]·W[i] for every pair: what a gradient G by `x` is by the values."""


class SparsePairs:
    """The active pairs of a batch with B rows and n features as a list; `h` are their pre-activations."""

    def __init__(self, pairs: ActivePairs, n: int) -> None:
        self.pairs, self.n, self.h = pairs, n, pairs.value

    @cached_property
    def order(self) -> FeatureOrder:
        """The pairs feature after feature."""
        return order_by_feature(self.pairs, self.n)

    def decode(self, values: Values, W: Float[Tensor, "n d"]) -> Decoding:
        """Row b is Σ_i v[b, i] W[i], over the active pairs."""
        x = decode_pairs(self.pairs._replace(value=values), W.detach())
        return Decoding(x, lambda G: dot_pairs(self.pairs, G, W))

    def collect(self, values: Values, X: Float[Tensor, "B d"]) -> Float[Tensor, "n d"]:
        """Row i is Σ_b v[b, i] X[b]: the gradient of a weight whose rows belong to features."""
        return collect_rows(self.order, values, X)

    def by_feature(self, values: Values) -> Float[Tensor, " n"]:
        """Entry i is Σ_b v[b, i]."""
        if values.device.type == "cpu":
            return values.new_zeros(self.n).index_add_(0, self.pairs.feature, values)
        ordered = values[self.order.pair]  # elsewhere index_add_ is not the same every time
        return torch.segment_reduce(ordered, "sum", offsets=self.order.start, initial=0.0)

    def of_feature(self, vector: Float[Tensor, " n"]) -> Values:
        """The entry of a per-feature vector that belongs to every pair (dense: one that broadcasts)."""
        return vector[self.pairs.feature]

    def fired(self, values: Values) -> Bool[Tensor, " n"]:
        """Features with a positive value in any row."""
        times = torch.zeros(self.n, dtype=torch.int32, device=values.device)
        return times.index_add_(0, self.pairs.feature, (values > 0).int()) > 0

    def total(self, values: Values) -> Float[Tensor, ""]:
        """Σ v[b, i] over the active pairs."""
        return values.sum()


class DensePairs:
    """All features of all rows, with a mask of the active pairs; the methods are those of `SparsePairs`, and none of
    them waits for the device."""

    def __init__(self, h: Float[Tensor, "B n"], mask: Bool[Tensor, "B n"], precision: Precision = "fp32") -> None:
        self.mask = mask
        self.precision: Precision = precision
        self._outside = ~mask
        self.h = self._clean = h.masked_fill_(self._outside, 0.0)

    def decode(self, values: Values, W: Float[Tensor, "n d"]) -> Decoding:
        precision, W = self.precision, W.detach()
        W = W.bfloat16() if precision == "bf16" else W  # once for both
        return Decoding(product(self._masked(values), W, precision), lambda G: product(G, W.T, precision))

    def collect(self, values: Values, X: Float[Tensor, "B d"]) -> Float[Tensor, "n d"]:
        return product(self._masked(values).T, X, self.precision)

    def by_feature(self, values: Values) -> Float[Tensor, " n"]:
        return self._masked(values).sum(0)

    def of_feature(self, vector: Float[Tensor, " n"]) -> Values:
        return vector

    def fired(self, values: Values) -> Bool[Tensor, " n"]:
        return (self._masked(values) > 0).any(0)

    def total(self, values: Values) -> Float[Tensor, ""]:
        return self._masked(values).sum()

    def _masked(self, values: Values) -> Float[Tensor, "B n"]:
        """The values with 0 outside the active pairs: the same tensor, unless it is one that broadcasts."""
        if values is self.h or values is self._clean:
            return values
        if values.shape != self.mask.shape:
            return torch.where(self.mask, values, 0.0)
        self._clean = values.masked_fill_(self._outside, 0.0)
        return self._clean


Active = SparsePairs | DensePairs


def active_above(
    encoder: DenseEncoder,
    z: Float[Tensor, "B d"],
    floor: float | Float[Tensor, " n"],
    *,
    execution: Execution | None = None,
) -> Active:
    """The pairs whose pre-activation is above a floor, as a list or, if they are many, as a table.

    Unless it is given, the first block of rows decides which, so that the choice depends on the data alone. In a list
    pre-activations have the precision of the weights, whatever that of the product that found them.

    Args:
        encoder: gives pre-activations.
        z: encoder inputs.
        floor: one for all features, or one for each.
        execution: "dense" gives the table, the others the list.
    """
    first = encoder(z[: encoder.block_rows]) if execution is None else None
    if first is not None and int((first > floor).count_nonzero()) > DENSE_ABOVE * first.numel():
        execution = "dense"
    if execution == "dense":
        h = encoder.table(z)
        return DensePairs(h, h > floor, encoder.precision)
    return SparsePairs(pairs_above(encoder, z, floor, first), encoder.W.shape[0])


def pairs_above(
    encoder: DenseEncoder,
    z: Float[Tensor, "B d"],
    floor: float | Float[Tensor, " n"],
    first: Float[Tensor, "b n"] | None = None,
) -> ActivePairs:
    """The pairs of `active_above` as a list, row after row; values are pre-activations.

    Those of the first block of rows may be given, if they are known already.
    """
    n = encoder.W.shape[0]
    if screening_is_fast(encoder) and (found := pairs_above_screened(encoder, z, floor)) is not None:
        return found
    values, features, counts = [], [], [torch.zeros(1, dtype=torch.long, device=z.device)]
    for number, block in enumerate(z.split(encoder.block_rows)):
        h = first if number == 0 and first is not None else encoder(block)
        is_above = h > floor
        place = true_places(is_above)
        row = place // n
        values.append(h.flatten()[place])
        features.append(place - row * n)
        counts.append(true_counts(is_above, row))
    pairs = ActivePairs(torch.cat(values), torch.cat(features), torch.cat(counts).cumsum(0))
    return in_full_precision(pairs, encoder, z)


def in_full_precision(pairs: ActivePairs, encoder: DenseEncoder, z: Float[Tensor, "B d"]) -> ActivePairs:
    """The pairs with their pre-activations computed anew, if the encoder's product had less precision."""
    if encoder.exact:
        return pairs
    return pairs._replace(value=dot_pairs(pairs, z, encoder.W) + encoder.b[pairs.feature])
