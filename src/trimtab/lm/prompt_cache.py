"""Keys and values of prompts that are decoded again and again, as in training a policy.

A prompt's tokens before the last are the same in every rollout as long as nothing edits them, so that they are fed to
the model once; so may be what prompts begin with that are computed together, such as a chat template's own words.
Memory is bounded: what was used least recently is forgotten and computed anew when it is needed.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.lm.batch import TokenBatch
from trimtab.lm.cache import GrowingCache, GrowingLayer
from trimtab.lm.model import LanguageModel
from trimtab.lm.transfers import to_device

SHARED = 8
"""Tokens at least that prompts begin with alike for these to be fed apart."""
FULL = 0.75
"""Share of the memory that heads may take. The rest is room for those to come, lest all be moved for each."""


class PromptCache:
    """The caches of prompt heads, a head being all tokens of a prompt but the last.

    Args:
        model: the model.
        max_bytes: what all caches together may take; one group of rows is held whatever it takes.
        batch_size: heads fed side by side at most.
        together: feed heads of like length side by side, and what all have in common at their begin once. Without it
            heads of one length are fed side by side, so that bits depend less on what is computed at the same time,
            which training that is to go on to the same bits needs. Where a model goes over to other positions at some
            length (`turning_length`), it is without.
    """

    def __init__(
        self, model: LanguageModel, *, max_bytes: int = 2 * 2**30, batch_size: int = 16, together: bool = False
    ) -> None:
        self.model, self.max_bytes, self.batch_size = model, max_bytes, batch_size
        self.together = together and not model.turning_length
        self.computed = 0
        """Heads that were fed to the model so far."""
        self._held: OrderedDict[tuple[int, ...], int] = OrderedDict()
        """Where each head's tokens begin among those that are kept."""
        self._kept: dict[int, _Tokens] = {}
        """Of each layer that has keys of its own."""
        self._live = 0
        """Tokens of all heads that are held."""

    @torch.no_grad()
    def load(self, heads: Sequence[Sequence[int]], reserve: int) -> GrowingCache:
        """A cache that holds the heads, one row each, padded on the left to the longest.

        Args:
            heads: token ids, none empty.
            reserve: length to allocate, in tokens.
        """
        wanted = [tuple(head) for head in heads]
        try:
            self._compute([head for head in dict.fromkeys(wanted) if head not in self._held])
        except BaseException:  # in the middle of it layers may differ in what they hold
            self._held, self._kept, self._live = OrderedDict(), {}, 0
            raise
        cache = self.model.new_cache(reserve=reserve)
        index = to_device(
            _padded([self._held[head] for head in wanted], [len(head) for head in wanted]), self.model.device
        )
        for place, kept in self._kept.items():
            cache.growing[place].gather(kept.keys, kept.values, index)
        for head in wanted:
            self._held.move_to_end(head)
        while self._live * self._token_bytes > FULL * self.max_bytes and len(self._held) > 1:
            forgotten, _ = self._held.popitem(last=False)
            self._live -= len(forgotten)
        return cache

    def _compute(self, heads: list[tuple[int, ...]]) -> None:
        begin = self._begin(heads) if self.together else None
        fed = 0 if begin is None else begin.length
        for part in self._parts(heads):
            cache = self.model.new_cache(reserve=len(part[-1]))
            if begin is not None:
                for layer, shared in zip(cache.growing, begin.growing, strict=True):
                    layer.repeat(shared, len(part))
            # Padding stands behind the heads, where none of their tokens sees it.
            self._feed([[*head[fed:], *[self.model.pad_id] * (len(part[-1]) - len(head))] for head in part], cache)
            self.computed += len(part)
            self._hold(part, cache)

    def _parts(self, heads: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """What is fed side by side: heads of one length, or the shortest first, the longest at most twice as long."""
        part: list[tuple[int, ...]] = []
        for head in sorted(heads, key=len):
            most = len(part[0]) * (1 + self.together) if part else 0
            if part and (len(head) > most or len(part) == self.batch_size):
                yield part
                part = []
            part.append(head)
        if part:
            yield part

    def _begin(self, heads: list[tuple[int, ...]]) -> GrowingCache | None:
        """What all heads begin with, in one row, but for their last tokens; None if that is too short to pay."""
        alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*heads, strict=False))
        shared = [column[0] for column in alike][: min(map(len, heads), default=1) - 1]
        if len(heads) < 2 or len(shared) < SHARED:
            return None
        cache = self.model.new_cache(reserve=len(shared))
        self._feed([shared], cache)
        return cache

    def _feed(self, rows: Sequence[Sequence[int]], cache: GrowingCache) -> None:
        batch = TokenBatch.full(torch.tensor(rows, device=self.model.device))
        with torch.autocast(self.model.device.type, enabled=False):  # what is held serves any precision
            self.model.forward(batch, cache=cache, last=1)

    def _hold(self, part: list[tuple[int, ...]], cache: GrowingCache) -> None:
        """Keep the tokens of heads that were fed side by side, padding behind them left out."""
        lengths = [len(head) for head in part]
        start = self._room(cache, sum(lengths))
        rows = torch.arange(len(part)).repeat_interleave(torch.tensor(lengths))
        times = torch.cat([torch.arange(length) for length in lengths])
        rows, times = (to_device(one, self.model.device) for one in (rows, times))
        for place, kept in self._kept.items():
            layer = cache.growing[place]
            assert layer.keys is not None
            assert layer.values is not None
            kept.put(start, layer.keys, layer.values, rows, times)
        for head, before in zip(part, itertools.accumulate(lengths, initial=0), strict=False):
            self._held[head] = start + before
        self._live += sum(lengths)

    def _room(self, cache: GrowingCache, count: int) -> int:
        """Where so many tokens fit behind those that are held. Where there is no room, tokens of heads that were
        forgotten go, and twice what is needed is allocated, or `max_bytes`."""
        if not self._kept:
            layers = enumerate(cache.growing)
            self._kept = {place: _Tokens(layer) for place, layer in layers if layer.keys is not None}
        first = next(iter(self._kept.values()))
        if first.end + count > first.capacity:
            order = torch.cat(
                [torch.zeros(1, dtype=torch.long)]
                + [torch.arange(start, start + len(head)) for head, start in self._held.items()]
            )
            order, needed = to_device(order, self.model.device), len(order) + count
            capacity = max(needed, min(2 * needed, self.max_bytes // self._token_bytes))
            for kept in self._kept.values():
                kept.move(order, capacity)
            begins = itertools.accumulate((len(head) for head in self._held), initial=1)
            self._held = OrderedDict(zip(self._held, begins, strict=False))
        start = first.end
        for kept in self._kept.values():
            kept.end += count
        return start

    @property
    def _token_bytes(self) -> int:
        return sum(kept.token_bytes for kept in self._kept.values())


class _Tokens:
    """A layer's keys and values of tokens, one behind the other; the first is all zeros, for padding.

    Args:
        layer: whose they are.
    """

    keys: Float[Tensor, "capacity heads width"]
    values: Float[Tensor, "capacity heads width"]

    def __init__(self, layer: GrowingLayer) -> None:
        assert layer.keys is not None
        assert layer.values is not None
        self.keys, self.values = (
            held.new_zeros(1, held.shape[1], held.shape[3]) for held in (layer.keys, layer.values)
        )
        self.end = 1
        """Where there is room."""

    @property
    def capacity(self) -> int:
        return len(self.keys)

    @property
    def token_bytes(self) -> int:
        return self.keys[0].nbytes + self.values[0].nbytes

    def put(
        self, start: int, keys: Tensor, values: Tensor, rows: Int[Tensor, " tokens"], times: Int[Tensor, " tokens"]
    ) -> None:
        """Keep some tokens of `[B, heads, length, width]`."""
        at = rows.to(keys.device), times.to(keys.device)
        self.keys[start : start + len(rows)] = keys.transpose(1, 2)[at]
        self.values[start : start + len(rows)] = values.transpose(1, 2)[at]

    def move(self, order: Int[Tensor, " tokens"], capacity: int) -> None:
        """Keep these tokens alone, in this order, with room for as many as `capacity`."""
        order = order.to(self.keys.device)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(capacity, *old.shape[1:])
            torch.index_select(old, 0, order, out=new[: len(order)])
            setattr(self, name, new)
        self.end = len(order)


def _padded(starts: Sequence[int], lengths: Sequence[int]) -> Int[Tensor, "B T"]:
    """Places of rows' tokens, padded on the left with 0."""
    length = torch.tensor(lengths)[:, None]
    time = torch.arange(max(lengths)) - (max(lengths) - length)
    return torch.where(time < 0, 0, time + torch.tensor(starts)[:, None])
