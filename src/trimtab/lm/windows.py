"""Local attention windows, shortened for trials of a few tokens, so that what goes wrong beyond a window shows."""

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
