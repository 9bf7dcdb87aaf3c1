"""What each edit did to the next-token distribution, by a batched pass after decoding.

Two divergences per chosen token, both KL(as steered ‖ other), in nats:

- local: the same cache, this token's edit removed. What this edit changed, given all earlier ones.
- total: the same tokens, no edit anywhere. What all edits so far changed.

The local one needs no pass per position. The sequence is fed twice at once, an edited copy and a clean copy of the same
tokens at the same positions, under a mask in which a clean token sees the edited copies strictly before it, and itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import Decoded, InterventionSource, LanguageModel, RowDelta, Site, TokenBatch, edited

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
        UserError: the model has layers with a kind of attention for which no mask is known here.
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
    edits = _edits_of_rows(model, decoded, source, rows, batch)
    with edited(model, edits):
        both = twin_logits(model, batch, count)
    steered, removed = (torch.log_softmax(part.float(), dim=-1) for part in both.split(count, dim=1))
    plain = torch.log_softmax(model.forward(batch, last=count).float(), dim=-1)
    local, total = _kl(steered, removed), _kl(steered, plain)
    top_with, top_without = steered.topk(min(top_k, steered.shape[-1])), removed.topk(min(top_k, removed.shape[-1]))
    for index, row in enumerate(rows):
        tokens = decoded.token_ids[row]
        last = slice(count - len(tokens), count)
        touched = _edited_positions(decoded, row)
        first = decoded.first_position(row) - 1
        found.kl_local.append([kl if first + i in touched else 0.0 for i, kl in enumerate(local[index, last].tolist())])
        found.kl_total.append(total[index, last].tolist())
        ids = torch.tensor(tokens, device=plain.device)
        found.unsteered_logp.append(plain[index, last].gather(1, ids[:, None])[:, 0].tolist())
        for top, lists in ((top_with, found.top_with), (top_without, found.top_without)):
            pairs = zip(top.indices[index, last].tolist(), top.values[index, last].tolist(), strict=True)
            lists.append([TopTokens(i, p) for i, p in pairs])


def _kl(p: Float[Tensor, "B T V"], q: Float[Tensor, "B T V"]) -> Float[Tensor, "B T"]:
    """KL(p ‖ q) of log-probabilities, never below 0."""
    return (p.exp() * (p - q)).sum(dim=-1).clamp_min(0)


def _edited_positions(decoded: Decoded, row: int) -> set[int]:
    log = decoded.edits
    return set(log.position[(log.row == row) & (log.feature >= 0).any(dim=1)].tolist())


def _edits_of_rows(
    model: LanguageModel, decoded: Decoded, source: InterventionSource, rows: list[int], batch: TokenBatch
) -> dict[Site, Callable[[Tensor], RowDelta | None]]:
    """The logged edits of some rows, as changes of the left-padded batch that holds them."""
    longest = batch.ids.shape[1]
    place = torch.full((len(decoded),), -1)
    place[rows] = torch.arange(len(rows))
    log = decoded.edits
    edits: dict[Site, Callable[[Tensor], RowDelta | None]] = {}
    for index, site in enumerate(source.sites):
        # The last position's edit chose nothing that is here, if a row was cut short.
        mine = log.take((log.site == index) & (place[log.row] >= 0))
        row = place[mine.row].to(model.device)
        mine = mine.to(model.device)
        time = longest - batch.lengths[row] + mine.position
        change = mine.edit().change(source.directions(site), row, time) if len(mine) else None
        edits[site] = lambda x, change=change: change
    return edits


def twin_logits(model: LanguageModel, batch: TokenBatch, count: int) -> Float[Tensor, "B 2C V"]:
    """Logits at the last `count` places of a batch, then those of clean copies of the same places.

    A copy has the same token and position, stands behind the batch, and sees the batch strictly before its own place,
    and itself. Whatever is edited in the batch is thereby seen in the copy's past, but not at its place.
    """
    length = batch.ids.shape[1]
    places = torch.cat([torch.arange(length), torch.arange(length - count, length)]).to(model.device)
    copy = torch.arange(length + count, device=model.device) >= length
    output = model.hf(
        input_ids=batch.ids[:, places],
        position_ids=batch.position_ids[:, places],
        attention_mask=_attention_masks(model, batch.real[:, places], places, copy),
        use_cache=False,
        logits_to_keep=2 * count,
    )
    return output.logits


def _attention_masks(model: LanguageModel, real: Bool[Tensor, "B S"], places: Tensor, copy: Bool[Tensor, " S"]) -> Any:
    """Additive masks `[B, 1, S, S]`, one per kind of layer where a model has several."""
    config = model.hf.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"KL with {model.name}", f"its layers use {', '.join(sorted(unknown))}", "leave out --kl")
    same = torch.eye(len(places), dtype=torch.bool, device=places.device)
    query, key = places[:, None], places[None, :]
    sees = torch.where(copy[:, None], key < query, key <= query) & ~copy[None, :] | same
    window = getattr(config, "sliding_window", None)
    near = query - key < window if window else torch.ones_like(sees)
    full = sees & real[:, None, :] | same
    sliding = sees & near & real[:, None, :] | same
    masks = {
        name: torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
        .masked_fill(~mask, torch.finfo(model.dtype).min)
        .unsqueeze(1)
        for name, mask in (("full_attention", full), ("sliding_attention", sliding))
    }
    if len(kinds) > 1:
        return masks
    # One kind only: models that name none slide if they have a window (Mistral).
    return masks["sliding_attention" if window and kinds != {"full_attention"} else "full_attention"]
