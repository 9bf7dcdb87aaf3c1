"""Lengths at which a model goes over to something else: windows, shortened for trials of a few tokens, and turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn

_NAMES = ("sliding_window", "attention_chunk_size", "attention_window_size", "local_attention")


def fixed_window(hf: transformers.PreTrainedModel) -> int:
    """Tokens of a window that a model has built into its layers, as GPT-Neo does; 0 if it has none."""
    found = getattr(hf.config.get_text_config(), "window_size", None)
    return found if isinstance(found, int) else 0


def turning_length(hf: transformers.PreTrainedModel) -> int:
    """Tokens up to which `longrope` has one set of frequencies, and beyond which another; 0 without it.

    Which set a forward pass uses follows from its largest position, for all its tokens. Keys in a cache stay as they
    were turned.
    """
    found = getattr(hf.config.get_text_config(), "rope_parameters", None)
    kinds = [found, *found.values()] if isinstance(found, dict) else []  # layers of several types have their own
    turns = [
        kind.get("original_max_position_embeddings")
        for kind in kinds
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope"
    ]
    return min((length for length in turns if isinstance(length, int)), default=0)


@contextmanager
def short_windows(hf: nn.Module, size: int) -> Iterator[None]:
    """A model's local windows and chunks are at most `size` tokens inside the block, then what they were.

    Masks are made from a model's config at every forward pass; some attention functions ask their module. Where a model
    has fixed its windows when it was made, nothing changes.
    """
    holders: dict[int, Any] = {}
    for module in hf.modules():
        config = getattr(module, "config", None)
        for holder in (module, config, getattr(config, "text_config", None)):
            if holder is not None:
                holders[id(holder)] = holder
    changed = [
        (holder, name, value)
        for holder in holders.values()
        for name in _NAMES
        if type(value := getattr(holder, name, None)) is int and value > size
    ]
    try:
        for holder, name, _value in changed:
            setattr(holder, name, size)
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)
