"""Keys and values of prompts that are decoded again and again, as in training a policy.

A prompt's tokens before the last are the same in every rollout as long as nothing edits them, so that they are fed to
the model once; so may be what prompts begin with that are computed together, such as a chat template's own words.
Memory is bounded: what was used least recently is forgotten and computed anew when it is needed.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.lm.batch import TokenBatch
from trimtab.lm.cache import GrowingCache
from trimtab.lm.model import LanguageModel

SHARED = 8
"""Tokens at least that prompts begin with alike for these to be fed apart."""


class _Held(NamedTuple):
    keys: list[Float[Tensor, "1 heads length width"]]
    values: list[Float[Tensor, "1 heads length width"]]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


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
        self._held: OrderedDict[tuple[int, ...], _Held] = OrderedDict()
        self._bytes = 0

    @torch.no_grad()
    def load(self, heads: Sequence[Sequence[int]], reserve: int) -> GrowingCache:
        """A cache that holds the heads, one row each, padded on the left to the longest.

        Args:
            heads: token ids, none empty.
            reserve: length to allocate, in tokens.
        """
        wanted = [tuple(head) for head in heads]
        self._compute([head for head in dict.fromkeys(wanted) if head not in self._held])
        cache = self.model.new_cache(reserve=reserve)
        rows = [self._held[head] for head in wanted]
        for number, layer in enumerate(cache.growing):
            layer.fill([row.keys[number] for row in rows], [row.values[number] for row in rows])
        for head in wanted:
            self._held.move_to_end(head)
        self._forget()
        return cache

    def _compute(self, heads: list[tuple[int, ...]]) -> None:
        begin = self._begin(heads) if self.together else None
        fed = 0 if begin is None else begin.length
        for part in self._parts(heads):
            cache = self.model.new_cache(reserve=len(part[-1]))
            if begin is not None:
                for layer, shared in zip(cache.growing, begin.growing, strict=True):
                    layer.fill([shared.keys] * len(part), [shared.values] * len(part))  # type: ignore[list-item]
            # Padding stands behind the heads, where none of their tokens sees it.
            self._feed([[*head[fed:], *[self.model.pad_id] * (len(part[-1]) - len(head))] for head in part], cache)
            self.computed += len(part)
            for row, head in enumerate(part):
                self._hold(head, cache, row)

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

    def _hold(self, head: tuple[int, ...], cache: GrowingCache, row: int) -> None:
        keys, values = [], []
        for layer in cache.growing:
            assert layer.keys is not None
            assert layer.values is not None
            keys.append(layer.keys[row : row + 1, :, : len(head)].clone())
            values.append(layer.values[row : row + 1, :, : len(head)].clone())
        self._held[head] = held = _Held(keys, values)
        self._bytes += held.bytes

    def _forget(self) -> None:
        while self._bytes > self.max_bytes and len(self._held) > 1:
            _, held = self._held.popitem(last=False)
            self._bytes -= held.bytes
