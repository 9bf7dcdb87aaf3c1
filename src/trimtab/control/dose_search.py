"""Equal strength by divergence: doses at which arms or single edits diverge as far from the unsteered model as others.

KL grows with the square of a small dose, so the first steps of a search follow that law; as soon as the target lies
between two doses tried, the search bisects their logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TRIES = 10
"""Scales that a search tries at most."""
LIMITS = 1 / 64, 64.0
"""The smallest and the largest of them."""


@dataclass(frozen=True, kw_only=True)
class KlMatch:
    """What a search for equal divergence came to."""

    scale: float
    """Factor on the doses."""
    target: float
    """The divergence to reach, in nats: for an arm the reference's mean KL to the unsteered model, per answer."""
    reached: float
    """The nearest divergence found."""
    tries: int
    tolerance: float
    """Allowed relative difference."""
    within: bool
    """Whether the nearest divergence is within the tolerance."""


def match_kl(
    kl: Callable[[float], float],
    target: float,
    *,
    tolerance: float = 0.05,
    tries: int = TRIES,
) -> KlMatch:
    """Find the scale at which a divergence reaches a target.

    Args:
        kl: mean divergence at a scale, in nats.
        target: above 0.
        tolerance: allowed relative difference.
        tries: calls of `kl` at most; the nearest is kept.
    """
    return match_kls(lambda scales: [kl(scales[0])], [target], tolerance=tolerance, tries=tries)[0]


def match_kls(
    kl: Callable[[list[float]], Sequence[float]],
    targets: Sequence[float],
    *,
    tolerance: float = 0.05,
    least: float = 0.0,
    tries: int = TRIES,
) -> list[KlMatch]:
    """The same for several searches at once; those that have ended are asked at their best scale while others go on.

    Args:
        kl: divergences at scales, one of each search, in nats.
        targets: one per search.
        least: differences up to this, in nats, are allowed however small the target.
        tolerance, tries: as in `match_kl`.
    """
    searches = [_Search(target, tolerance, least) for target in targets]
    for _ in range(tries):
        for search, found in zip(searches, kl([search.scale for search in searches]), strict=True):
            search.see(float(found))
        if all(search.ended for search in searches):
            break
    return [search.result() for search in searches]


class _Search:
    """One search: where it is in the logarithm of the scale, and the nearest divergence so far."""

    def __init__(self, target: float, tolerance: float, least: float) -> None:
        self.target, self.tolerance, self.allowed = target, tolerance, max(tolerance * target, least)
        self.low, self.high = map(math.log, LIMITS)
        self.below, self.above, self.bracketed = self.low, self.high, [False, False]
        self.at, self.best, self.tries, self.ended = 0.0, (math.inf, 1.0, 0.0), 0, False

    @property
    def scale(self) -> float:
        return self.best[1] if self.ended else math.exp(self.at)

    def see(self, found: float) -> None:
        """Take the divergence at the scale, and move on unless the search has ended."""
        if self.ended:
            return
        at, target = self.at, self.target
        self.tries += 1
        miss = abs(found - target)
        self.best = min(self.best, (miss, math.exp(at), found))
        stuck = (at == self.low and found > target) or (at == self.high and found < target)
        if miss <= self.allowed or stuck:
            self.ended = True
            return
        if found < target:
            self.below, self.bracketed[0] = at, True
        else:
            self.above, self.bracketed[1] = at, True
        if all(self.bracketed):
            self.at = (self.below + self.above) / 2
        else:
            step = 0.5 * math.log(target / found) if found > 0 < target else math.log(4)
            step = math.copysign(min(max(abs(step), 0.05), math.log(4)), target - found)
            self.at = min(max(at + step, self.below), self.above)

    def result(self) -> KlMatch:
        miss, scale, reached = self.best
        return KlMatch(
            scale=scale, target=self.target, reached=reached, tries=self.tries, tolerance=self.tolerance,
            within=miss <= self.allowed,
        )  # fmt: skip
