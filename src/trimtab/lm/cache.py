"""A key-value cache that grows in place, can be repeated for forks and drops finished rows.

`transformers`' dynamic cache copies every layer's keys and values at every token (torch.cat); this one
writes into storage with room to spare and hands out views. Sliding-window layers keep everything too:
their window is enforced by the mask, so that a fork beyond the window needs nothing special.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
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
        self._storage: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._grow(key_states, value_states, max(self.reserve, key_states.shape[2]))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self._storage is None:
            self.lazy_initialization(key_states, value_states)
        assert self._storage is not None
        end, capacity = self.length + key_states.shape[2], self._storage[0].shape[2]
        if end > capacity:
            self._grow(key_states, value_states, max(end, capacity + GROWTH))
        keys, values = self._storage
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        return self._hold((keys, values), end)

    def fill(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Hold blocks of rows `[n, heads, length, head_dim]` of any length, padded on the left with zeros."""
        length = max(block.shape[2] for block in keys)
        self._hold((self._stacked(blocks, length) for blocks in (keys, values)), length)

    def repeat(self, other: GrowingLayer, rows: int) -> None:
        """Hold what another layer holds in its one row, in so many."""
        if other.keys is None:  # a layer that takes another's keys and values
            return
        assert other.values is not None
        self.fill([other.keys.expand(rows, -1, -1, -1)], [other.values.expand(rows, -1, -1, -1)])

    def gather(
        self, keys: Float[Tensor, "N heads k"], values: Float[Tensor, "N heads v"], index: Int[Tensor, "B T"]
    ) -> None:
        """Hold some of N tokens, those that `index` names for each row."""
        index = index.to(keys.device)
        shown = [(held, (*index.shape, *held.shape[1:])) for held in (keys, values)]
        blocks = [held.index_select(0, index.flatten()).view(shape).transpose(1, 2) for held, shape in shown]
        self.fill(blocks[:1], blocks[1:])

    def _stacked(self, blocks: Sequence[Tensor], length: int) -> Tensor:
        _, heads, _, width = blocks[0].shape
        sizes = [len(block) for block in blocks]
        storage = blocks[0].new_empty(sum(sizes), heads, max(self.reserve, length), width)
        for into, block in zip(storage.split(sizes), blocks, strict=True):
            start = length - block.shape[2]
            into[:, :, :start] = 0
            into[:, :, start:length] = block
        return storage

    def _grow(self, key_states: Tensor, value_states: Tensor, capacity: int) -> None:
        grown = []
        for states, held in ((key_states, self.keys), (value_states, self.values)):
            batch, heads, _, width = states.shape
            storage = states.new_empty(batch, heads, capacity, width)
            if held is not None:
                storage[:, :, : self.length] = held
            grown.append(storage)
        self._hold(grown, self.length)

    def _hold(self, storage: Iterable[Tensor], length: int) -> tuple[Tensor, Tensor]:
        keys, values = storage
        self._storage, self.length = (keys, values), length
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        return self.keys, self.values

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given batch rows."""
        if self._storage is not None:
            self._hold((storage.index_select(0, rows) for storage in self._storage), self.length)

    def append(self, other: GrowingLayer, mine: int, theirs: int, reserve: int) -> None:
        """Put another layer's rows behind these, of which the last `mine` and `theirs` places hold tokens."""
        if self._storage is None:  # a layer that takes another's keys and values
            assert other._storage is None
            return
        assert other._storage is not None
        self.reserve = reserve
        keys, values = (
            [ours[:, :, self.length - mine : self.length], added[:, :, other.length - theirs : other.length]]
            for ours, added in zip(self._storage, other._storage, strict=True)
        )
        self.fill(keys, values)

    def unfold(self, copies: int, own: int, reserve: int) -> None:
        """Give every row `copies` rows, side by side.

        Args:
            copies: of each row.
            reserve: length to allocate for each, in tokens.
            own: with 1, the last `copies` places of a row are one for each copy; with 0, every copy has all places.
        """
        if self._storage is None:
            return
        self.reserve = reserve
        shared = self.length - own * copies
        self._hold((self._unfolded(storage, copies, shared, own) for storage in self._storage), shared + own)

    def _unfolded(self, storage: Tensor, copies: int, shared: int, own: int) -> Tensor:
        rows, heads, _, width = storage.shape
        unfolded = storage.new_empty(rows, copies, heads, max(self.reserve, shared + own), width)
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
    """Keys and values put before those of any forward pass, which leaves them as they are. One row serves any.

    Args:
        layer: what holds them.
        length: how many of them, from the first; all by default.
    """

    def __init__(self, layer: GrowingLayer, length: int | None = None) -> None:
        super().__init__()
        self.length, self.keys, self.values = layer.length, layer.keys, layer.values
        if length is not None and self.keys is not None and self.values is not None:
            self.length, self.keys, self.values = length, self.keys[:, :, :length], self.values[:, :, :length]
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


class PlacedLayer(FrozenLayer):
    """Keys and values of whole rows, in which those of tokens that are fed take the place of others.

    Args:
        layer: what holds them.
        time: `[B, Q]` which places the tokens take. Masks and positions must say so, too.
    """

    def __init__(self, layer: GrowingLayer, time: Tensor) -> None:
        super().__init__(layer)
        self.time = time

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        each = torch.arange(len(self.time), device=self.time.device)[:, None]
        keys, values = self.keys.clone(), self.values.clone()
        keys[each, :, self.time] = key_states.transpose(1, 2)
        values[each, :, self.time] = value_states.transpose(1, 2)
        return keys, values

    def get_seq_length(self) -> int:
        return 0


class GrowingCache(Cache):
    """One `GrowingLayer` per decoder layer.

    Args:
        n_layers: layers of the model.
        reserve: sequence length to allocate at once, in tokens.
    """

    keeps_nothing = False
    """Whether it hands on what it is given and that is all, so that none who looks at it need know of it."""

    def __init__(self, n_layers: int, reserve: int = 0) -> None:
        self.growing = [GrowingLayer(reserve) for _ in range(n_layers)]
        super().__init__(layers=list(self.growing))

    @property
    def length(self) -> int:
        """Tokens held, padding included."""
        return self.growing[0].length

    def frozen(self, length: int | None = None) -> GrowingCache:
        """What is held now, as a cache that stays as it is whatever is fed; it shares this one's memory.

        Args:
            length: only so many tokens, from the first.
        """
        found = GrowingCache(len(self.growing))
        found.growing = found.layers = [FrozenLayer(layer, length) for layer in self.growing]
        return found

    def in_places(self, time: Tensor) -> GrowingCache:
        """What is held now, as a cache in which tokens that are fed take the places `time [B, Q]` of others."""
        found = GrowingCache(len(self.growing))
        found.growing = found.layers = [PlacedLayer(layer, time) for layer in self.growing]
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

    def append(self, other: GrowingCache, mine: int, theirs: int, reserve: int) -> None:
        """Put another cache's rows behind these, and drop what is padding in all of them.

        Args:
            other: of the same model.
            mine, theirs: the longest row's tokens.
            reserve: length to allocate, in tokens.
        """
        for layer, theirs_layer in zip(self.growing, other.growing, strict=True):
            layer.append(theirs_layer, mine, theirs, reserve)

    def unfold(self, copies: int, layer: int, reserve: int) -> None:
        """Rows of their own for copies of each row that were fed side by side from a layer on.

        Args:
            copies: of each row.
            reserve: length to allocate for each, in tokens.
            layer: from here on the last `copies` places of a row belong to one copy each; below, all places to all.
        """
        for number, found in enumerate(self.growing):
            found.unfold(copies, own=int(number >= layer), reserve=reserve)
