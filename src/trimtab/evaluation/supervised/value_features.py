"""Features of one value of an attribute: which they are, how they overlap, what they say together, if they recur."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

LEAST_PRECISION = 0.9
"""Share of a feature's prompts that have the value."""
LEAST_FIRINGS = 20
"""Train prompts on which a feature fires at least; of fewer, many would be of one value by chance."""
SIMILAR = 0.5
"""Mean cosine of decoder rows at which clusters are joined."""


def overlap(a: Bool[Tensor, "P n"], b: Bool[Tensor, "P m"]) -> Float[Tensor, "n m"]:
    """Prompts on which both fire, of those on which either does (intersection over union); 0 where neither does."""
    one, other = a.float(), b.float()  # whole numbers, exact
    both = one.T @ other
    return both / (one.sum(0)[:, None] + other.sum(0) - both).clamp_min(1)


def chance_overlap(p: Float[Tensor, " n"], q: Float[Tensor, " m"]) -> Float[Tensor, "n m"]:
    """The overlap of features that fire independently with rates p and q: pq / (p + q − pq)."""
    both = p[:, None] * q
    return both / (p[:, None] + q - both).clamp_min(torch.finfo(both.dtype).tiny)


def of_value(fired: Bool[Tensor, "P n"], has: Bool[Tensor, " P"]) -> Bool[Tensor, " n"]:
    """Features that fire on at least `LEAST_FIRINGS` prompts, and on prompts with the value in `LEAST_PRECISION` of
    them."""
    times = fired.sum(0)
    return (times >= LEAST_FIRINGS) & ((fired & has[:, None]).sum(0) >= LEAST_PRECISION * times)


def union_order(fired: Bool[Tensor, "P n"], has: Bool[Tensor, " P"], most: int) -> list[int]:
    """Features one after the other, each the one whose firing, united with those before, has the largest F1; ends
    where no further one raises it."""
    said, order, best = torch.zeros_like(has), [], 0.0
    fresh, right = fired.double(), (fired & has[:, None]).double()
    for _ in range(min(most, fired.shape[1])):
        free = (~said).double()
        times = said.sum() + free @ fresh
        hits = (said & has).sum() + free @ right
        f1 = 2 * hits / (times + has.sum()).clamp_min(1)
        at = int(f1.argmax())
        if float(f1[at]) <= best:
            break
        best = float(f1[at])
        order.append(at)
        said = said | fired[:, at]
    return order


def clusters(rows: Float[Tensor, "n width"]) -> Int[Tensor, " n"]:
    """Cluster of each row: average linkage of cosines, joined down to `SIMILAR`."""
    if len(rows) < 2:
        return torch.zeros(len(rows), dtype=torch.long)
    return torch.from_numpy(fcluster(linkage(rows.double().numpy(), "average", "cosine"), 1 - SIMILAR, "distance")) - 1


class Recurring(NamedTuple):
    """Features of one SAE, each beside the one of another SAE that writes the most similar direction."""

    cosine: Tensor  # [n] of decoder rows
    chance: Tensor  # [n] the largest cosine with random rows of the same number and covariance
    overlap: Tensor  # [n] of the prompts on which both fire
    exchanged: Tensor  # [n] mean overlap with the matches of the others


def recurrence(
    rows: Float[Tensor, "n width"],
    others: Float[Tensor, "m width"],
    fired: Bool[Tensor, "P n"],
    fired_others: Bool[Tensor, "P m"],
    seed: int = 0,
) -> Recurring:
    """Match features to those of another SAE.

    Args:
        rows: decoder rows of the features, two or more.
        others: those of the other SAE that fire.
        fired: on P prompts.
        fired_others: on the same.
        seed: of random rows.
    """
    cosine, match = (_unit(rows) @ _unit(others).T).max(1)
    generator = torch.Generator().manual_seed(seed)
    # Random mixtures of the other SAE's rows have their covariance, and none of their directions.
    mixed = torch.randn(len(others), len(others), generator=generator, dtype=rows.dtype) @ _unit(others)
    shared = overlap(fired, fired_others[:, match])
    own = shared.diagonal()
    return Recurring(
        cosine, (_unit(rows) @ _unit(mixed).T).max(1).values, own, (shared.sum(1) - own) / max(len(own) - 1, 1)
    )


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
