"""Which features headroom tries: all, or the first that a mask allows, in the order of a rule.

- `top-confidence`: by delta-confidence, as the mask of that name takes them;
- `random`: a seeded draw, which says what features in general can do rather than what the best-ranked ones can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from trimtab.control.setting import Setting
from trimtab.errors import UserError
from trimtab.lm import Site
from trimtab.selection import rank
from trimtab.steering import DirectionTable

CandidateRule = Literal["top-confidence", "random"]
COUNT = 48
"""Features that are tried unless another number is asked for."""


class TriedFeatures(NamedTuple):
    """Features that are tried, in the order of their rule."""

    features: tuple[int, ...]
    of: int
    """How many features the dictionary has."""
    rule: CandidateRule | Literal["all"]

    @classmethod
    def all(cls, n: int) -> TriedFeatures:
        """Every feature, by its number."""
        return cls(tuple(range(n)), n, "all")


class NothingAllowedError(UserError):
    """A mask allows no feature at the last prompt token of any item."""

    def __init__(self, mask: str, site: Site | str | None, items: int) -> None:
        super().__init__(
            f"mask {mask}",
            f"it allows no live feature at {site}, at the last prompt token of any of {items} items",
            "choose another mask, or an SAE trained at this site of this model",
        )


def candidate_order(setting: Setting, rule: CandidateRule) -> list[int]:
    """Every feature that ever fired, in the order in which a rule tries them.

    Args:
        setting: model, dictionary and site; its seed is that of the draw.
        rule: `top-confidence` or `random`; without statistics the latter draws from all features.

    Raises:
        UserError: `top-confidence` without feature statistics, or no feature ever fired.
    """
    dictionary = setting.needed_dictionary()
    if rule == "random":
        live = DirectionTable.of(dictionary).live_ids().numpy()
        return np.random.default_rng([setting.seed, 12]).permutation(live).tolist()
    if dictionary.feature_stats is None:
        raise UserError(
            "the order by delta-confidence",
            "the SAE comes without feature statistics (feature_stats.parquet), so it is unknown how strongly its "
            "features fire",
            "compute them with `trimtab sae stats SAE --text FILE`, or choose candidates "
            "random and masks other than top-confidence",
        )
    return rank(setting.model, dictionary, "delta-confidence", site=setting.needed_site()).feature.tolist()


def first_allowed(
    order: Sequence[int],
    count: int | None,
    allowed: Bool[np.ndarray, "P n"],
    *,
    rule: CandidateRule,
    mask: str,
    site: Site | str,
) -> TriedFeatures:
    """The first features of an order that a mask allows on at least one item.

    Args:
        order: as `candidate_order` gives it.
        count: how many; fewer are taken where no more are allowed. None for 48, or all if there are fewer.
        allowed: what the mask allows at each item's last prompt token.
        rule: the order's, for the report.
        mask, site: for the message.

    Raises:
        UserError: the dictionary has fewer features than `count`, or the mask allows none of the order.
    """
    n = allowed.shape[1]
    if count is not None and count > n:
        raise UserError(f"features {count}", f"the SAE has {n:,}", f"give at most {n}")
    anywhere = set(np.flatnonzero(allowed.any(axis=0)).tolist())
    found = tuple(feature for feature in order if feature in anywhere)[: count or COUNT]
    if not found:
        raise NothingAllowedError(mask, site, len(allowed))
    return TriedFeatures(found, n, rule)
