"""What decoding feeds to the model: whole prompts, one token per row, one token for all copies of a prompt."""

from __future__ import annotations

from torch import Tensor

from trimtab.lm.batch import TokenBatch
from trimtab.lm.cache import GrowingCache
from trimtab.lm.editing import SourceRunner
from trimtab.lm.model import LanguageModel
from trimtab.lm.upper_layers import MOST_COPIES, can_run_from, first_edited_layer, side_by_side


def parting_layer(model: LanguageModel, runner: SourceRunner | None, repeats: int) -> int | None:
    """The layer from which copies of a prompt differ at its last token; None if they must be fed one by one."""
    if not 1 < repeats <= MOST_COPIES:
        return None
    if runner is None:
        return model.n_layers
    layer = first_edited_layer(runner.sites)
    return layer if can_run_from(model, layer, "copies") else None


def prefill(
    model: LanguageModel,
    batch: TokenBatch,
    cache: GrowingCache,
    active: Tensor,
    prompt_length: Tensor,
    runner: SourceRunner | None,
) -> Tensor:
    """Feed whole prompts, rows `active` of the decode call, to an empty cache.

    Returns:
        Logits `[B, V]` behind each row's last token; so do all of these.
    """
    if runner:
        selected = runner.source.positions.selects(batch.position_ids, prompt_length[:, None]) & batch.real
        runner.aim(batch.ids, batch.position_ids, selected, active[:, None].expand_as(batch.ids))
    return model.forward(batch, cache=cache, last=1)[:, -1]


def step(
    model: LanguageModel,
    ids: Tensor,
    cache: GrowingCache,
    held: Tensor,
    active: Tensor,
    prompt_length: Tensor,
    runner: SourceRunner | None,
) -> Tensor:
    """Feed one token per row behind `held` real tokens in the cache."""
    if runner:
        selected = runner.source.positions.selects(held, prompt_length)
        runner.aim(ids[:, None], held[:, None], selected[:, None], active[:, None])
    past = _past_lengths(cache, held)
    return model.forward(TokenBatch.full(ids[:, None]), cache=cache, past_lengths=past, last=1)[:, -1]


def step_copies(
    model: LanguageModel,
    ids: Tensor,
    cache: GrowingCache,
    held: Tensor,
    active: Tensor,
    prompt_length: Tensor,
    runner: SourceRunner | None,
    parting: int,
) -> Tensor:
    """Feed one token per prompt behind `held` real tokens in the cache, for copies `active` `[B, copies]`."""
    copies, past = active.shape[1], _past_lengths(cache, held)
    batch = TokenBatch.full(ids[:, None])
    if runner is None:
        return model.forward(batch, cache=cache, past_lengths=past, last=1)[:, -1].repeat_interleave(copies, dim=0)
    selected = runner.source.positions.selects(held, prompt_length)
    for_each = (-1, copies)
    runner.aim(
        ids[:, None].expand(for_each), held[:, None].expand(for_each), selected[:, None].expand(for_each), active
    )
    with side_by_side(model, parting, copies, cache.length):
        logits = model.forward(batch, cache=cache, past_lengths=past, last=copies)
    return logits.reshape(active.numel(), -1)


def _past_lengths(cache: GrowingCache, held: Tensor) -> Tensor | None:
    """`held` if the cache is padded."""
    return held if cache.length > 0 and bool((held != cache.length).any()) else None
