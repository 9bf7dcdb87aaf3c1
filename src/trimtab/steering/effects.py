"""What each edit did to the next-token distribution, by a batched pass after decoding.

Two divergences per chosen token, both KL(as steered ‖ other), in nats:

- local: the same cache, this token's edit removed. What this edit changed, given all earlier ones.
- total: the same tokens, no edit anywhere. What all edits so far changed.

The local one needs no pass per position. The sequence is fed twice at once, an edited copy and a clean copy of the same
tokens at the same positions, under a mask in which a clean token sees the edited copies strictly before it, and itself.
What lies below the first edit is the same in all passes, and computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import Decoded, InterventionSource, LanguageModel, RowDelta, Site, TokenBatch, capture, edited
from trimtab.lm.token_statistics import kl_divergence
from trimtab.lm.upper_layers import can_run_from, first_edited_layer, input_site, masked_as_copies, starting_at

_Edits = dict[Site, Callable[[Tensor], RowDelta | None]]

LOGIT_BUDGET = 1 << 26
"""Logits held at once; rows per pass follow from it."""


class TopTokens(NamedTuple):
    """The most likely next tokens, most likely first."""

    ids: list[int]
    logp: list[float]


@dataclass(frozen=True, kw_only=True)
class TokenEffects:
    """Per row and chosen token, as in `Decoded.token_ids`. The edit meant is the one at the position before."""

    kl_local: list[list[float]]
    """KL(with all edits ‖ with this edit removed); 0 where nothing was edited."""
    kl_total: list[list[float]]
    """KL(with all edits ‖ with no edit)."""
    unsteered_logp: list[list[float]]
    """Log-probability of the token under the unedited model."""
    top_with: list[list[TopTokens]]
    """Most likely tokens with all edits."""
    top_without: list[list[TopTokens]]
    """Most likely tokens with this edit removed."""


@torch.no_grad()
def token_effects(
    model: LanguageModel,
    decoded: Decoded,
    source: InterventionSource,
    *,
    top_k: int = 5,
    progress: Callable[[int], None] | None = None,
) -> TokenEffects:
    """Measure what the logged edits did at every chosen token.

    Args:
        model: the model that decoded.
        decoded: tokens and edits.
        source: the source that decided the edits, for its sites and directions; it is not asked again.
        top_k: tokens to list with and without each edit.
        progress: called with the number of rows whenever some are done.

    Raises:
        UserError: copies of tokens cannot stand side by side in the model's layers.
    """
    found = TokenEffects(kl_local=[], kl_total=[], unsteered_logp=[], top_with=[], top_without=[])
    longest = max(map(len, decoded.token_ids))
    per_pass = max(1, min(16, LOGIT_BUDGET // (2 * longest * model.vocab_size)))
    for start in range(0, len(decoded), per_pass):
        rows = list(range(start, min(start + per_pass, len(decoded))))
        _measure(model, decoded, source, rows, top_k, found)
        if progress:
            progress(len(rows))
    return found


def _measure(
    model: LanguageModel,
    decoded: Decoded,
    source: InterventionSource,
    rows: list[int],
    top_k: int,
    found: TokenEffects,
) -> None:
    inputs = [decoded.prompts[r] + decoded.forced[r] + decoded.token_ids[r][:-1] for r in rows]
    batch = TokenBatch.pad(inputs, model.pad_id, model.device)
    count = max(len(decoded.token_ids[r]) for r in rows)
    layer = first_edited_layer([model.site(site) for site in source.sites])
    below = capture(model, batch, [input_site(layer)])[input_site(layer)]
    edits = _edits_of_rows(model, decoded, source, rows, batch)
    both = _twin_logits(model, batch, count, edits, below, layer)
    with starting_at(model, layer, below):
        unedited = model.forward(batch, last=count)
    steered, removed = both.split(count, dim=1)
    local, total = (
        kl_divergence(steered.flatten(0, 1), x.flatten(0, 1)).unflatten(0, (-1, count)) for x in (removed, unedited)
    )
    steered, removed, plain = (torch.log_softmax(x.float(), dim=-1) for x in (steered, removed, unedited))
    top_with, top_without = steered.topk(min(top_k, steered.shape[-1])), removed.topk(min(top_k, removed.shape[-1]))
    log = decoded.edits
    for index, row in enumerate(rows):
        tokens = decoded.token_ids[row]
        last = slice(count - len(tokens), count)
        touched = set(log.position[(log.row == row) & (log.feature >= 0).any(dim=1)].tolist())
        first = decoded.first_position(row) - 1
        found.kl_local.append([kl if first + i in touched else 0.0 for i, kl in enumerate(local[index, last].tolist())])
        found.kl_total.append(total[index, last].tolist())
        ids = torch.tensor(tokens, device=plain.device)
        found.unsteered_logp.append(plain[index, last].gather(1, ids[:, None])[:, 0].tolist())
        for top, lists in ((top_with, found.top_with), (top_without, found.top_without)):
            pairs = zip(top.indices[index, last].tolist(), top.values[index, last].tolist(), strict=True)
            lists.append([TopTokens(i, p) for i, p in pairs])


def _edits_of_rows(
    model: LanguageModel, decoded: Decoded, source: InterventionSource, rows: list[int], batch: TokenBatch
) -> _Edits:
    """The logged edits of some rows, as changes of the left-padded batch that holds them."""
    longest = batch.ids.shape[1]
    place = torch.full((len(decoded),), -1)
    place[rows] = torch.arange(len(rows))
    log = decoded.edits
    edits: _Edits = {}
    for index, site in enumerate(source.sites):
        # The last position's edit chose nothing that is here, if a row was cut short.
        mine = log.take((log.site == index) & (place[log.row] >= 0))
        row = place[mine.row].to(model.device)
        mine = mine.to(model.device)
        time = longest - batch.lengths[row] + mine.position
        change = mine.edit().change(source.directions(site), row, time) if len(mine) else None
        edits[site] = lambda x, change=change: change
    return edits


def _twin_logits(
    model: LanguageModel, batch: TokenBatch, count: int, edits: _Edits, below: Float[Tensor, "B T d"], layer: int
) -> Float[Tensor, "B 2C V"]:
    """Logits at the last `count` places of an edited batch, then those of clean copies of the same places.

    A copy has the same token and position, stands behind the batch, and sees the batch strictly before its own place,
    and itself. Whatever is edited in the batch is thereby seen in the copy's past, but not at its place.
    """
    if not can_run_from(model, layer, "copies"):
        why = "its attention cannot be shown copies of tokens beside them"
        raise UserError(f"KL with {model.name}", why, "turn it off: --no-kl (kl=False)")
    length = batch.ids.shape[1]
    place = torch.cat([torch.arange(length), torch.arange(length - count, length)]).to(model.device)
    with ExitStack() as stack:
        stack.enter_context(starting_at(model, layer, below[:, place]))
        stack.enter_context(masked_as_copies(model, layer, place, originals=length))
        stack.enter_context(edited(model, edits))
        output = model.call(
            input_ids=batch.ids[:, place],
            position_ids=batch.position_ids[:, place],
            attention_mask=batch.attention_mask[:, place] if batch.padded else None,
            use_cache=False,
            logits_to_keep=2 * count,
        )
    return output.logits
