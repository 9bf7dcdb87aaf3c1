"""Sparse codes and the products that training needs of them: all touch active (row, feature) pairs only.

Every product is a weighted bag of rows (`embedding_bag`), reduced in a fixed order, so that results do not depend on
the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

GROUPS = (8, 4, 2)


class SparseCodes(NamedTuple):
    """k codes per row; a feature may be listed with code 0."""

    values: Float[Tensor, "B k"]
    indices: Int[Tensor, "B k"]

    def dense(self, n: int) -> Float[Tensor, "B n"]:
        """The codes among all n features."""
        return self.values.new_zeros(*self.values.shape[:-1], n).scatter_(-1, self.indices, self.values)

    def pairs(self) -> ActivePairs:
        """The same codes as a list of pairs."""
        rows, k = self.values.shape
        return ActivePairs(
            self.values.flatten(),
            self.indices.flatten(),
            torch.arange(0, rows * k + 1, k, device=self.values.device),
        )


class ActivePairs(NamedTuple):
    """The active (row, feature) pairs of a batch, row after row; rows may hold different numbers of them."""

    value: Float[Tensor, " m"]
    feature: Int[Tensor, " m"]
    start: Int[Tensor, " rows_and_end"]
    """Where each row's pairs begin; the last entry is m."""

    @property
    def row(self) -> Int[Tensor, " m"]:
        """Row of every pair."""
        rows = torch.arange(self.start.shape[0] - 1, device=self.start.device)
        return rows.repeat_interleave(self.start.diff(), output_size=self.feature.shape[0])


class FeatureOrder(NamedTuple):
    """The same pairs, feature after feature."""

    pair: Int[Tensor, " m"]
    """Index into the row-ordered pairs."""
    row: Int[Tensor, " m"]
    start: Int[Tensor, " features_and_end"]
    """Where each feature's pairs begin; the last entry is m."""


def largest(h: Float[Tensor, "B n"], k: int) -> SparseCodes:
    """The k largest entries of every row, in no particular order; exactly `torch.topk`, faster for wide rows.

    A row is folded into groups whose maxima are compared first: the k groups with the largest maxima hold the k largest
    entries, and only those groups are searched.
    """
    n = h.shape[-1]
    fold = next((g for g in GROUPS if n % g == 0 and n // g >= 4 * k), 1)
    if fold == 1:
        return SparseCodes(*h.topk(k, dim=-1, sorted=False))
    width = n // fold
    group = h.unflatten(-1, (fold, width)).amax(1).topk(k, dim=-1, sorted=False).indices
    members = torch.arange(0, n, width, device=h.device)
    candidate = (group[:, None, :] + members[:, None]).flatten(1)
    values, which = h.gather(1, candidate).topk(k, dim=-1, sorted=False)
    return SparseCodes(values, candidate.gather(1, which))


def decode_pairs(pairs: ActivePairs, W: Float[Tensor, "n d"]) -> Float[Tensor, "B d"]:
    """Row b is Σ_i f[b, i] W[i]. Differentiable in the values if W asks for no gradient."""
    return F.embedding_bag(
        pairs.feature, W, pairs.start, mode="sum", per_sample_weights=pairs.value, include_last_offset=True
    )


@torch.enable_grad()
def dot_pairs(pairs: ActivePairs, X: Float[Tensor, "B d"], W: Float[Tensor, "n d"]) -> Float[Tensor, " m"]:
    """X[b]·W[i] for every pair (b, i), whatever its value: the derivative of Σ_b X[b]·x̂[b] by the values."""
    value = pairs.value.detach().to(X.dtype).requires_grad_()
    (dot,) = torch.autograd.grad(decode_pairs(pairs._replace(value=value), W.detach()), value, X)
    return dot


def order_by_feature(pairs: ActivePairs, n: int) -> FeatureOrder:
    """Sort pairs by feature; within one feature rows keep their order."""
    feature = pairs.feature
    if feature.device.type == "cpu" and n <= 2**16:  # numpy sorts 16-bit keys by radix, 4 times as fast as torch
        pair = torch.from_numpy(np.argsort(feature.numpy().astype(np.uint16), kind="stable"))
    else:
        pair = feature.argsort(stable=True)
    start = torch.zeros(n + 1, dtype=torch.long, device=feature.device)
    torch.cumsum(torch.bincount(feature, minlength=n), 0, out=start[1:])
    return FeatureOrder(pair, pairs.row[pair], start)


def collect_rows(order: FeatureOrder, values: Float[Tensor, " m"], X: Float[Tensor, "B d"]) -> Float[Tensor, "n d"]:
    """Row i is Σ_b v[b, i] X[b]: the gradient of a weight whose rows belong to features.

    Args:
        order: the pairs by feature.
        values: one weight per pair, in the row order.
        X: what is collected.
    """
    return F.embedding_bag(
        order.row, X, order.start, mode="sum", per_sample_weights=values[order.pair], include_last_offset=True
    )


def sum_by_feature(pairs: ActivePairs, values: Float[Tensor, " m"], n: int) -> Float[Tensor, " n"]:
    """Entry i is Σ_b v[b, i]."""
    return values.new_zeros(n).index_add_(0, pairs.feature, values)
