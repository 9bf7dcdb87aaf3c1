"""Whether a model's decoding steps can be captured as a graph, told on a CPU."""

from __future__ import annotations

import torch
from tests.lm.nothing_asked import what_asks

from trimtab.lm import LanguageModel, TokenBatch
from trimtab.lm.slotted_cache import SlottedCache
from trimtab.lm.steps_ahead import can_step_ahead, slotted_logits


def why_not_captured(model: LanguageModel) -> str | None:
    """Why a GPU cannot replay a model's decoding steps as a graph; empty if it can, None if it does not decode."""
    if "decode" not in model.capabilities:
        return None
    if not can_step_ahead(model, None):
        return "behind a cache of a fixed size it fails or gives other logits"
    batch = TokenBatch.pad([[7, 8, 9], [5, 6, 7, 8, 9]])
    cache, places = model.new_cache(), torch.arange(64)
    with torch.no_grad():
        model.forward(batch, cache=cache, last=1)
    place = torch.tensor([cache.length])
    slotted = SlottedCache(cache, torch.arange(2), len(places), place)
    return what_asks(lambda: slotted_logits(model, slotted, batch.ids[:, -1], batch.lengths, place, places))
