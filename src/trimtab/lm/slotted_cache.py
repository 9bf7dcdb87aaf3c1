"""A key-value cache of a fixed size, in which a number on the device says where the next token goes.

Nothing that reads or writes it changes its address or its shape, which a step that is captured as a graph needs.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

from trimtab.lm.cache import GrowingCache, GrowingLayer


class SlottedLayer(GrowingLayer):
    """Keys and values `[B, heads, capacity, head_dim]`, all of which every token is shown; the mask says what counts.

    Args:
        layer: what it holds at first.
        rows: `[B]` which of its rows, the same ones several times among them.
        capacity: tokens of a row at most.
        place: `[1]` where the next token goes, on the device.
    """

    is_compileable = True  # `transformers` then makes the mask whatever it hides, and never asks where `place` is

    def __init__(self, layer: GrowingLayer, rows: Int[Tensor, " B"], capacity: int, place: Int[Tensor, " 1"]) -> None:
        super().__init__()
        self.place, self.capacity = place, capacity
        assert layer.keys is not None
        assert layer.values is not None
        shapes = [(len(rows), held.shape[1], capacity, held.shape[3]) for held in (layer.keys, layer.values)]
        self._hold((layer.keys.new_empty(shape) for shape in shapes), capacity)
        self.load(layer, rows)

    def load(self, layer: GrowingLayer, rows: Int[Tensor, " B"]) -> None:
        """Hold what another layer holds."""
        assert self._storage is not None
        for mine, held in zip(self._storage, (layer.keys, layer.values), strict=True):
            assert held is not None
            mine[:, :, : layer.length] = held[rows]
            mine[:, :, layer.length :] = 0  # what is masked counts 0 times what is there, which is to be a number

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self._storage is not None
        for mine, new in zip(self._storage, (key_states, value_states), strict=True):
            mine.index_copy_(2, self.place, new)
        return self._storage

    def grown(self, rows: int, length: int) -> GrowingLayer:
        """The first rows as a layer that grows, with the same memory."""
        assert self._storage is not None
        found = GrowingLayer(self.capacity)
        found._hold((held[:rows] for held in self._storage), length)
        return found

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0

    def get_seq_length(self) -> Tensor:  # type: ignore[override]
        return self.place[0]


class SlottedCache(GrowingCache):
    """One `SlottedLayer` per decoder layer that holds anything; arguments as there.

    Layers that take another's keys and values, as Gemma 3n's last ones do, hold nothing.
    """

    def __init__(self, cache: GrowingCache, rows: Int[Tensor, " B"], capacity: int, place: Int[Tensor, " 1"]) -> None:
        super().__init__(0)
        own = [layer if layer.keys is None else SlottedLayer(layer, rows, capacity, place) for layer in cache.growing]
        self.growing, self.layers = [*own], [*own]

    def load(self, cache: GrowingCache, rows: Int[Tensor, " B"]) -> None:
        """Hold what another cache holds."""
        for mine, held in zip(self.growing, cache.growing, strict=True):
            if isinstance(mine, SlottedLayer):
                mine.load(held, rows)

    def grown(self, rows: int, length: int) -> GrowingCache:
        """The first rows as a cache that grows, with the same memory."""
        found = GrowingCache(0)
        layers: list[Any] = [
            layer.grown(rows, length) if isinstance(layer, SlottedLayer) else layer for layer in self.growing
        ]
        found.growing = found.layers = layers
        return found
