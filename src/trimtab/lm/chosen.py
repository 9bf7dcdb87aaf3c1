"""What rows choose from their logits at a step of decoding, and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.lm.row import Row
from trimtab.lm.sampling import FIRST, choose_allowed, choose_token
from trimtab.lm.token_statistics import token_statistics


class Way(NamedTuple):
    """How a row chooses."""

    temperature: float
    top_p: float
    restricted: bool
    """Among tokens of its own."""


def ways_of(rows: Sequence[Row]) -> dict[Way, list[int]]:
    """The places of rows that choose in each way."""
    found: dict[Way, list[int]] = {}
    for place, row in enumerate(rows):
        way = Way(row.config.temperature, row.config.top_p, row.allowed is not None)
        found.setdefault(way, []).append(place)
    return found


class Chosen(NamedTuple):
    """What rows chose at one step, `[B]`, or at several, `[N, B]`."""

    ids: Int[Tensor, "*N B"]
    """To be fed."""
    decided: Int[Tensor, "*N B"]
    logp: Float[Tensor, "*N B"]
    decided_logp: Float[Tensor, "*N B"]
    entropy: Float[Tensor, "*N B"]
    allowed_logp: Float[Tensor, "*N B A"] | None
    """Of the tokens that rows may choose from, where any row is restricted."""


def told(chosen: Chosen) -> list[list[Any] | None]:
    """Its columns as Python's numbers. From a GPU they come by one copy, since it is waited for at each."""
    if chosen.ids.device.type != "cpu":
        chosen = on_host(chosen)
    return [None if column is None else column.tolist() for column in chosen]


def on_host(chosen: Chosen) -> Chosen:
    """The same on the CPU, fetched at once."""
    lead = chosen.ids.ndim
    kept = {name: column for name, column in chosen._asdict().items() if column is not None}
    flat = [column if column.ndim > lead else column[..., None] for column in kept.values()]
    together = torch.cat([column.double() for column in flat], dim=-1).cpu()  # which holds any token and any float
    parts = together.split([column.shape[-1] for column in flat], dim=-1)
    back = {
        name: part.reshape(column.shape).to(column.dtype)
        for (name, column), part in zip(kept.items(), parts, strict=True)
    }
    return chosen._replace(**back)


def choose(
    logits: Float[Tensor, "B V"],
    ways: Mapping[Way, Sequence[int]],
    u: Float[Tensor, " B"] | None,
    allowed: Int[Tensor, "B A"] | None = None,
    given: Int[Tensor, " B"] | None = None,
    first: int | None = FIRST,
) -> Chosen:
    """The next token of each row, rows that choose in the same way at once.

    Args:
        logits: of each row's next token.
        ways: the rows' places by how they choose.
        u: draws, where any row is sampled.
        allowed: what each row may choose from, as `pack_allowed` gives it.
        given: tokens that are fed instead of those that are chosen; −1 for none.
        first: tokens that a nucleus is looked for in first; None asks the device for nothing.
    """

    def decided_by(way: Way, which: slice | Tensor) -> Int[Tensor, " R"]:
        how = (way.temperature, way.top_p, None if u is None else u[which], first)
        if not way.restricted:
            return choose_token(logits[which], *how)
        assert allowed is not None
        return choose_allowed(allowed[which], logits[which], *how)

    if len(ways) == 1:
        decided = decided_by(next(iter(ways)), slice(None))
    else:
        decided = logits.new_empty(len(logits), dtype=torch.long)
        for way, places in ways.items():
            which = torch.tensor(places, device=logits.device)
            decided[which] = decided_by(way, which)
    ids = decided if given is None else torch.where(given < 0, decided, given)
    logp, entropy = token_statistics(logits, ids)
    decided_logp, of_allowed = logp, None
    if given is not None:
        decided_logp = logp + (logits.gather(1, decided[:, None]) - logits.gather(1, ids[:, None]))[:, 0].float()
    if allowed is not None:
        total = logits.gather(1, ids[:, None])[:, 0].float() - logp
        of_allowed = logits.gather(1, allowed).float() - total[:, None]
    return Chosen(ids, decided, logp, decided_logp, entropy, of_allowed)
