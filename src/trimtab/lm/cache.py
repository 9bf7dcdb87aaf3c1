"""A key-value cache that grows in place, can be repeated for forks and drops finished rows.

`transformers`' dynamic cache copies every layer's keys and values at every token (torch.cat); this one
writes into storage with room to spare and hands out views. Sliding-window layers keep everything too:
their window is enforced by the mask, so that a fork beyond the window needs nothing special.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 64  # rows of storage added at least, when full


class GrowingLayer(CacheLayerMixin):
    """Keys and values `[B, heads, length, head_dim]` of one layer, as views of larger storage."""

    is_sliding = False
    is_croppable = False

    def __init__(self, reserve: int = 0) -> None:
        super().__init__()
        self.length = 0
        self.reserve = reserve
        self._key_storage: Tensor | None = None
        self._value_storage: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._grow(key_states, value_states, max(self.reserve, key_states.shape[2]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._key_storage is not None
        assert self._value_storage is not None
        end = self.length + key_states.shape[2]
        if end > self._key_storage.shape[2]:
            self._grow(key_states, value_states, max(end, self._key_storage.shape[2] + GROWTH))
        self._key_storage[:, :, self.length : end] = key_states
        self._value_storage[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self._key_storage[:, :, :end], self._value_storage[:, :, :end]
        return self.keys, self.values

    def fill(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Begin with rows `[heads, length, head_dim]` of any length, padded on the left with zeros."""
        self.length = max(row.shape[1] for row in keys)
        self._key_storage, self._value_storage = self._padded(keys), self._padded(values)
        self.keys, self.values = self._key_storage[:, :, : self.length], self._value_storage[:, :, : self.length]
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def _padded(self, rows: Sequence[Tensor]) -> Tensor:
        heads, _, width = rows[0].shape
        storage = rows[0].new_empty(len(rows), heads, max(self.reserve, self.length), width)
        for into, row in zip(storage.unbind(), rows, strict=True):
            start = self.length - row.shape[1]
            into[:, :start] = 0
            into[:, start : self.length] = row
        return storage

    def _grow(self, key_states: Tensor, value_states: Tensor, capacity: int) -> None:
        batch, heads, _, width = key_states.shape
        keys = key_states.new_empty(batch, heads, capacity, width)
        values = value_states.new_empty(batch, heads, capacity, value_states.shape[3])
        if self.keys is not None and self.values is not None:
            keys[:, :, : self.length], values[:, :, : self.length] = self.keys, self.values
        self._key_storage, self._value_storage = keys, values

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given batch rows."""
        if self._key_storage is None or self._value_storage is None:
            return
        self._key_storage = self._key_storage.index_select(0, rows)
        self._value_storage = self._value_storage.index_select(0, rows)
        self.keys = self._key_storage[:, :, : self.length]
        self.values = self._value_storage[:, :, : self.length]

    def unfold(self, copies: int, own: int, reserve: int) -> None:
        """Give every row `copies` rows, side by side.

        Args:
            copies: of each row.
            reserve: length to allocate for each, in tokens.
            own: with 1, the last `copies` places of a row are one for each copy; with 0, every copy has all places.
        """
        if self._key_storage is None or self._value_storage is None:
            return
        self.reserve = reserve
        shared = self.length - own * copies
        self.length = shared + own
        self._key_storage = self._unfolded(self._key_storage, copies, shared, own)
        self._value_storage = self._unfolded(self._value_storage, copies, shared, own)
        self.keys = self._key_storage[:, :, : self.length]
        self.values = self._value_storage[:, :, : self.length]

    def _unfolded(self, storage: Tensor, copies: int, shared: int, own: int) -> Tensor:
        rows, heads, _, width = storage.shape
        unfolded = storage.new_empty(rows, copies, heads, max(self.reserve, self.length), width)
        unfolded[:, :, :, :shared] = storage[:, None, :, :shared]
        if own:
            unfolded[:, :, :, shared] = storage[:, :, shared : shared + copies].transpose(1, 2)
        return unfolded.flatten(0, 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class FrozenLayer(GrowingLayer):
    """Keys and values put before those of any forward pass, which leaves them as they are. One row serves any."""

    def __init__(self, layer: GrowingLayer) -> None:
        super().__init__()
        self.length, self.keys, self.values = layer.length, layer.keys, layer.values
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return key_states, value_states
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=2),
        )


class GrowingCache(Cache):
    """One `GrowingLayer` per decoder layer.

    Args:
        n_layers: layers of the model.
        reserve: sequence length to allocate at once, in tokens.
    """

    def __init__(self, n_layers: int, reserve: int = 0) -> None:
        self.growing = [GrowingLayer(reserve) for _ in range(n_layers)]
        super().__init__(layers=list(self.growing))

    @property
    def length(self) -> int:
        """Tokens held, padding included."""
        return self.growing[0].length

    def frozen(self) -> GrowingCache:
        """What is held now, as a cache that stays as it is whatever is fed; it shares this one's memory."""
        found = GrowingCache(len(self.growing))
        found.growing = found.layers = [FrozenLayer(layer) for layer in self.growing]
        return found

    def select(self, rows: Tensor) -> None:
        """Keep (or, with repeats in `rows`, copy) batch rows in every layer."""
        for layer in self.growing:
            layer.select(rows)

    def repeat(self, times: int) -> None:
        """Every row `times` times, copies side by side."""
        keys = self.growing[0].keys
        assert keys is not None, "there is nothing to repeat"
        self.select(torch.arange(keys.shape[0], device=keys.device).repeat_interleave(times))

    def unfold(self, copies: int, layer: int, reserve: int) -> None:
        """Rows of their own for copies of each row that were fed side by side from a layer on.

        Args:
            copies: of each row.
            reserve: length to allocate for each, in tokens.
            layer: from here on the last `copies` places of a row belong to one copy each; below, all places to all.
        """
        for number, found in enumerate(self.growing):
            found.unfold(copies, own=int(number >= layer), reserve=reserve)
