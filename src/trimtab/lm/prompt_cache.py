"""Keys and values of prompts that are decoded again and again, as in training a policy.

A prompt's tokens before the last are the same in every rollout as long as nothing edits them, so that they are fed to
the model once. Memory is bounded: what was used least recently is forgotten and computed anew when it is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.lm.batch import TokenBatch
from trimtab.lm.cache import GrowingCache
from trimtab.lm.model import LanguageModel


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
        batch_size: heads computed together; they have one length, so that none is padded.
    """

    def __init__(self, model: LanguageModel, *, max_bytes: int = 2 * 2**30, batch_size: int = 16) -> None:
        self.model, self.max_bytes, self.batch_size = model, max_bytes, batch_size
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
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for head in heads:
            by_length.setdefault(len(head), []).append(head)
        for same in by_length.values():
            for start in range(0, len(same), self.batch_size):
                part = same[start : start + self.batch_size]
                cache = self.model.new_cache(reserve=len(part[0]))
                batch = TokenBatch.full(torch.tensor(part, device=self.model.device))
                with torch.autocast(self.model.device.type, enabled=False):  # what is held serves any precision
                    self.model.forward(batch, cache=cache, last=1)
                self.computed += len(part)
                for row, head in enumerate(part):
                    self._hold(head, cache, row)

    def _hold(self, head: tuple[int, ...], cache: GrowingCache, row: int) -> None:
        keys, values = [], []
        for layer in cache.growing:
            assert layer.keys is not None
            assert layer.values is not None
            keys.append(layer.keys[row : row + 1].clone())
            values.append(layer.values[row : row + 1].clone())
        self._held[head] = held = _Held(keys, values)
        self._bytes += held.bytes

    def _forget(self) -> None:
        while self._bytes > self.max_bytes and len(self._held) > 1:
            _, held = self._held.popitem(last=False)
            self._bytes -= held.bytes
