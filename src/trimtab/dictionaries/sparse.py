"""Sparse codes and the products that training needs of them: all touch active (row, feature) pairs only.

Every product is a weighted bag of rows (`embedding_bag`), reduced in a fixed order, so that results do not depend on
the number of threads.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from trimtab.kernels import kernel_for, row_kernel_for

GROUP_SIZES = (8, 4, 2)
"""Entries of a group, the first that fits."""
SPARSE_BELOW = 0.06
"""Share of the features that fire in the fullest row up to which a list of them beats a dense row."""


class Groups(NamedTuple):
    """Entries of a row folded so that entry i belongs to group i mod count."""

    size: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class SparseCodes(NamedTuple):
    """k codes per row; a feature may be listed with code 0, which is a slot that is not used."""

    values: Float[Tensor, "B k"]
    indices: Int[Tensor, "B k"]

    def dense(self, n: int) -> Float[Tensor, "B n"]:
        """The codes among all n features."""
        return self.values.new_zeros(*self.values.shape[:-1], n).scatter_add_(-1, self.indices, self.values)

    def scaled(self, unit: Float[Tensor, "B 1"]) -> SparseCodes:
        """Each row's codes times a number of its own."""
        return self._replace(values=self.values * unit)

    def pairs(self) -> ActivePairs:
        """The same codes as a list of pairs."""
        rows, k = self.values.shape
        return ActivePairs(
            self.values.flatten(),
            self.indices.flatten(),
            torch.arange(0, rows * k + 1, k, device=self.values.device),
        )


def list_codes(f: Float[Tensor, "B n"]) -> SparseCodes | Float[Tensor, "B n"]:
    """The positive codes of dense rows, features ascending; the dense rows themselves if one has too many of them."""
    fires = f > 0
    counts = fires.sum(1)
    most = max(1, int(counts.max())) if len(f) else 1
    if most > SPARSE_BELOW * f.shape[1]:
        return f
    row, feature = fires.nonzero(as_tuple=True)
    slot = torch.arange(len(row), device=f.device) - (counts.cumsum(0) - counts)[row]
    found = SparseCodes(f.new_zeros(len(f), most), feature.new_zeros(len(f), most))
    found.values[row, slot] = f[row, feature]
    found.indices[row, slot] = feature
    return found


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

    def scaled(self, unit: Float[Tensor, "rows 1"]) -> ActivePairs:
        """Each row's codes times a number of its own."""
        return self._replace(value=self.value * unit[self.row, 0])

    def where(self, kept: Bool[Tensor, " m"]) -> ActivePairs:
        """Some of the pairs."""
        place, before = true_places(kept), torch.cat([self.start[:1], kept.cumsum(0)])
        return ActivePairs(self.value[place], self.feature[place], before[self.start])


def pairs_of(codes: SparseCodes | Float[Tensor, "B n"]) -> ActivePairs:
    """The positive codes of rows as a list, row after row."""
    if isinstance(codes, SparseCodes):
        return codes.pairs().where(codes.values.flatten() > 0)
    row, feature = (codes > 0).nonzero(as_tuple=True)
    start = torch.searchsorted(row, torch.arange(len(codes) + 1, device=row.device))
    return ActivePairs(codes[row, feature], feature, start)


class FeatureOrder(NamedTuple):
    """The same pairs, feature after feature."""

    pair: Int[Tensor, " m"]
    """Index into the row-ordered pairs."""
    row: Int[Tensor, " m"]
    start: Int[Tensor, " features_and_end"]
    """Where each feature's pairs begin; the last entry is m."""


def largest(h: Float[Tensor, "B n"], k: int, *, folded: bool = True) -> SparseCodes:
    """The k largest entries of every row, in no particular order; exactly `torch.topk`, faster for wide rows.

    Where there is no kernel for it, a row is folded into groups whose maxima are compared first: the k groups with the
    largest maxima hold the k largest entries, and only those groups are searched. Folded or not, other entries may be
    taken of those that are equal to the smallest.
    """
    if largest_in_rows := row_kernel_for("largest_in_rows", h):
        return SparseCodes(*largest_in_rows(h, k))
    groups = fold_into_groups(h.shape[-1], k) if folded else None
    if groups is None:
        return SparseCodes(*h.topk(k, dim=-1, sorted=False))
    group = largest(h.unflatten(-1, groups).amax(1), k, folded=False).indices
    candidate = members(group, groups)
    values, which = largest(h.gather(1, candidate), k, folded=False)
    return SparseCodes(values, candidate.gather(1, which))


def keep_largest(h: Float[Tensor, "B n"], k: int, *, folded: bool = True) -> Float[Tensor, "B n"]:
    """Every row with its k largest entries where they are, those below 0 set to 0, and 0 for all others.

    It may be written over h. `folded` is as for `largest`.
    """
    if keep_largest_in_rows := row_kernel_for("keep_largest_in_rows", h):
        return keep_largest_in_rows(h, k)
    codes = largest(h, k, folded=folded)
    return codes._replace(values=codes.values.relu()).dense(h.shape[-1])


def fold_into_groups(n: int, k: int) -> Groups | None:
    """How to fold n entries so that the k largest can be searched by groups; None if that would save nothing."""
    size = next((size for size in GROUP_SIZES if n % size == 0 and n // size >= 4 * k), None)
    return None if size is None else Groups(size, n // size)


def members(group: Int[Tensor, "B k"], groups: Groups) -> Int[Tensor, "B size*k"]:
    """Places of all entries of some groups of every row."""
    first = torch.arange(0, groups.size * groups.count, groups.count, device=group.device)
    return (group[:, None, :] + first[:, None]).flatten(1)


def largest_places(x: Int[Tensor, "B n"], k: int) -> Int[Tensor, "B k"]:
    """Places of the k largest of n ≤ 65,536 small integers (16 bits) in every row, on the CPU.

    numpy partitions integers with vector instructions, several times as fast as `torch.topk`; with a number's place in
    its low bits the partitioned numbers say where they were.
    """
    keys = (x.int() << 16) | torch.arange(x.shape[1], dtype=torch.int32)
    array, first = keys.numpy(), x.shape[1] - k
    rows = len(array)
    edges = [rows * part // torch.get_num_threads() for part in range(torch.get_num_threads() + 1)]
    parts = [array[a:b] for a, b in itertools.pairwise(edges) if a < b]
    if len(parts) == 1:
        array.partition(first, axis=1)
    else:
        list(_pool(len(parts)).map(lambda part: part.partition(first, axis=1), parts))
    return (keys[:, first:] & 0xFFFF).long()


def true_places(mask: Bool[Tensor, ...]) -> Int[Tensor, " m"]:
    """Flat indices of what is true, in ascending order."""
    if mask.device.type == "cpu":  # twice as fast as torch
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)


def true_counts(mask: Bool[Tensor, "B n"], row: Int[Tensor, " m"]) -> Int[Tensor, " B"]:
    """How many of each row are true, given the row of each that is."""
    if mask.device.type == "cpu":
        return torch.bincount(row, minlength=len(mask))
    return mask.sum(1)  # counting would wait for the device


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="partition")


def decode_pairs(pairs: ActivePairs, W: Float[Tensor, "n d"]) -> Float[Tensor, "B d"]:
    """Row b is Σ_i f[b, i] W[i]. Differentiable in the values if W asks for no gradient."""
    return _weighted_bags(pairs.feature, pairs.value, pairs.start, W)


def dot_pairs(pairs: ActivePairs, X: Float[Tensor, "B d"], W: Float[Tensor, "n d"]) -> Float[Tensor, " m"]:
    """X[b]·W[i] for every pair (b, i), whatever its value: the derivative of Σ_b X[b]·x̂[b] by the values."""
    if bag_dots := kernel_for("bag_dots", X, W.detach()):
        return bag_dots(pairs.feature, pairs.start, X, W)
    mode = 0  # sum
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        X, W.detach(), pairs.feature, pairs.start[:-1], pairs.row, mode
    )


def dot_rows(indices: Int[Tensor, "B m"], X: Float[Tensor, "B d"], W: Float[Tensor, "n d"]) -> Float[Tensor, "B m"]:
    """X[b]·W[i] for the m features i of every row b."""
    pairs = SparseCodes(X.new_empty(indices.shape), indices).pairs()
    return dot_pairs(pairs, X, W).reshape(indices.shape)


def order_by_feature(pairs: ActivePairs, n: int) -> FeatureOrder:
    """Sort pairs by feature; within one feature rows keep their order."""
    feature = pairs.feature
    if feature.device.type == "cpu" and n <= 2**16:  # numpy sorts 16-bit keys by radix, 4 times as fast as torch
        pair = torch.from_numpy(np.argsort(feature.numpy().astype(np.uint16), kind="stable"))
    else:
        pair = feature.argsort(stable=True)
    if feature.device.type == "cpu":
        start = torch.zeros(n + 1, dtype=torch.long)
        torch.cumsum(torch.bincount(feature, minlength=n), 0, out=start[1:])
    else:  # counting would wait for the device
        start = torch.searchsorted(feature[pair], torch.arange(n + 1, device=feature.device))
    return FeatureOrder(pair, pairs.row[pair], start)


def collect_rows(order: FeatureOrder, values: Float[Tensor, " m"], X: Float[Tensor, "B d"]) -> Float[Tensor, "n d"]:
    """Row i is Σ_b v[b, i] X[b] of values in row order: the gradient of a weight whose rows belong to features."""
    return _weighted_bags(order.row, values[order.pair], order.start, X)


def _weighted_bags(index: Tensor, weight: Tensor, start: Tensor, W: Tensor) -> Tensor:
    """Row b is the sum of weight[p]·W[index[p]] over the pairs p from start[b] to start[b + 1]."""
    if weighted_bags := kernel_for("weighted_bags", weight, W):
        return weighted_bags(index, weight, start, W)
    return F.embedding_bag(index, W, start, mode="sum", per_sample_weights=weight, include_last_offset=True)
