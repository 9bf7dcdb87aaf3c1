"""Equal strength by divergence: the scale of an arm's doses at which its mean KL is the policy's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KlMatch:
    """What a search for equal divergence came to, on validation items."""

    scale: float
    """Factor on the arm's doses."""
    target: float
    """The policy's mean KL to the unsteered model, in nats per answer."""
    reached: float
    """The arm's."""
    tries: int
    tolerance: float
    """Allowed relative difference."""

    @property
    def within(self) -> bool:
        return abs(self.reached - self.target) <= self.tolerance * self.target

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"within": self.within}


def match_kl(
    kl: Callable[[float], float],
    target: float,
    *,
    tolerance: float = 0.05,
    tries: int = 10,
    limits: tuple[float, float] = (1 / 64, 64.0),
) -> KlMatch:
    """Find the scale at which a divergence reaches a target.

    KL grows with the square of a small dose, so the first steps follow that law; as soon as the target lies between
    two scales tried, the search bisects their logarithms.

    Args:
        kl: mean divergence at a scale, in nats.
        target: above 0.
        tolerance: allowed relative difference.
        tries: calls of `kl` at most; the nearest is kept.
        limits: smallest and largest scale.
    """
    assert target > 0
    low, high = math.log(limits[0]), math.log(limits[1])
    below, above = low, high
    bracketed = [False, False]
    at, best, called = 0.0, (math.inf, 1.0, 0.0), 0
    while called < tries:
        found = kl(math.exp(at))
        called += 1
        miss = abs(found - target) / target
        best = min(best, (miss, math.exp(at), found))
        if miss <= tolerance or (at == low and found > target) or (at == high and found < target):
            break
        if found < target:
            below, bracketed[0] = at, True
        else:
            above, bracketed[1] = at, True
        if all(bracketed):
            at = (below + above) / 2
        else:
            step = 0.5 * math.log(target / found) if found > 0 else math.log(4)
            step = math.copysign(min(max(abs(step), 0.05), math.log(4)), target - found)
            at = min(max(at + step, below), above)
    return KlMatch(scale=best[1], target=target, reached=best[2], tries=called, tolerance=tolerance)
