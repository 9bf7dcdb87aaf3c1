"""Headroom where answers are longer than a token: each candidate is held over the whole answer, and all are decoded.

Nothing but decoding says what such an answer earns, so that some features are tried rather than all (see
`headroom_candidates`), beside as many random directions of equal norm. Rows differ only in the direction that they are
steered with: without an edit, with each candidate, with each random direction; they go through the one decode loop
together, greedily, and every prompt is fed to the model once.

The lines are read with two limits in mind. A feature that was not tried may do better than the ceiling; and so may a
policy, which may change its feature from token to token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.control.masks import FeatureMask
from trimtab.control.task_prompts import TaskPrompts, last_prompt_activations
from trimtab.dictionaries import Dictionary
from trimtab.lm import LanguageModel, PromptCache, Site
from trimtab.policies.headroom import HeadroomTable, allowed_at_first, random_directions
from trimtab.policies.headroom_candidates import Candidates
from trimtab.steering import DirectionTable, StaticSource

BATCH_SIZE = 64


class DecodingPlan(NamedTuple):
    """How much is decoded, at most, at one site."""

    items: int
    features: int
    random: int
    doses: int
    max_new_tokens: int

    @property
    def answers(self) -> int:
        """Rows decoded."""
        return self.items * self.doses * (1 + self.features + self.random)

    @property
    def tokens(self) -> int:
        """New tokens, if no answer ends early."""
        return self.answers * self.max_new_tokens

    def describe(self) -> str:
        """The plan in one line."""
        return (
            f"up to {self.tokens:,} tokens will be decoded: {self.answers:,} answers of up to {self.max_new_tokens} "
            f"tokens ({self.items} items without an edit, with {self.features} features and with {self.random} random "
            f"directions, at {self.doses} dose{'s' * (self.doses != 1)})"
        )


def headroom_by_decoding(
    model: LanguageModel,
    dictionary: Dictionary,
    prompts: TaskPrompts,
    candidates: Candidates,
    *,
    site: Site | str,
    dose: float,
    unit: str = "relative",
    mask: FeatureMask | None = None,
    randoms: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    prompt_cache: PromptCache | None = None,
    progress: Callable[[int], None] | None = None,
) -> HeadroomTable:
    """Decode every item's answer with each candidate, and with random directions, added wherever a token is chosen.

    Args:
        model: the model.
        dictionary: whose features are tried.
        prompts: items of a task; answers may have any length.
        candidates: the features that are tried: the table's columns.
        site: where.
        dose: of each edit, in `unit`.
        unit: `relative`, `absolute` or `max_activation`. Random directions take the candidates' mean length.
        mask: what is allowed at the last prompt token, for the report.
        randoms: random directions to try; by default as many as candidates.
        seed: of the random directions: the first of those that `headroom_table` tries.
        batch_size: rows decoded together.
        prompt_cache: holds prompts' keys and values; by default one of its own.
        progress: called with the number of answers decoded.

    Raises:
        UserError: see `roll_out`; statistics are missing for `max_activation`.
    """
    where = model.site(site)
    cache = prompt_cache or PromptCache(model)
    x = last_prompt_activations(model, prompts, where, cache)
    ids = torch.tensor(candidates.features)
    count, extra = len(ids), len(ids) if randoms is None else randoms
    held = _held(dictionary, ids, random_directions(dictionary, seed)[:extra], dose)
    slots, items = len(held.slot), len(prompts)
    reward = np.zeros(items * slots, dtype=np.float32)
    for start in range(0, len(reward), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(reward)))
        slot = rows % slots
        source = StaticSource(held.table, held.slot[slot][:, None], held.dose[slot][:, None], where, unit=unit)
        few = prompts.take((rows // slots).tolist())
        decoded = few.decode(model, source, seed=seed, batch_size=batch_size, prompt_cache=cache)
        reward[start : start + len(rows)] = [outcome.reward for outcome in few.outcomes(decoded)]
        if progress is not None:
            progress(len(rows))
    reward = reward.reshape(items, slots)
    codes = dictionary.encode(torch.from_numpy(x).to(model.device)) * dictionary.decoder_norms
    return HeadroomTable(
        reward=reward[:, 1 : 1 + count],
        random=reward[:, 1 + count :],
        unsteered=reward[:, 0],
        x=x,
        strength=codes[:, ids.to(codes.device)].float().cpu().numpy(),
        allowed=None if mask is None else allowed_at_first(model, prompts, mask, x)[:, ids.numpy()],
        candidates=candidates,
        scheme="every answer token",
    )


class _Held(NamedTuple):
    """Directions to hold; each slot of an item names one, −1 none, and its dose."""

    table: DirectionTable
    slot: Int[Tensor, " S"]
    dose: Float[Tensor, " S"]


def _held(dictionary: Dictionary, ids: Int[Tensor, " m"], noise: Float[Tensor, "r d"], dose: float) -> _Held:
    rows = dictionary.directions
    stats = dictionary.feature_stats
    most = None
    if stats is not None:
        own = torch.as_tensor(stats.max_activation)[ids]
        most = torch.cat([own, own.mean().expand(len(noise))])
    directions = torch.cat([rows[ids.to(rows.device)], noise.to(rows.device, rows.dtype)])
    doses = torch.full((1 + len(directions),), abs(dose))
    doses[: 1 + len(ids)] = dose
    return _Held(DirectionTable(directions, max_activation=most), torch.arange(-1, len(directions)), doses)
