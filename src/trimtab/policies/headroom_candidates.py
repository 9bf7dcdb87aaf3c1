"""Which features headroom tries where trying all of them would take too long.

A rule puts the features that ever fired in an order, and the first of it that a mask allows are tried:

- `top-confidence`: by delta-confidence, as the mask of that name takes them;
- `random`: a seeded draw, which says what features in general can do rather than what the best-ranked ones can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, Site
from trimtab.selection import rank
from trimtab.steering import DirectionTable

CandidateRule = Literal["top-confidence", "random"]
RULES: tuple[str, ...] = get_args(CandidateRule)
COUNT = 48
"""Features that are tried unless another number is asked for."""


class Candidates(NamedTuple):
    """Features that are tried, in the order of their rule."""

    features: tuple[int, ...]
    of: int
    """How many features the dictionary has."""
    rule: CandidateRule


class NothingAllowedError(UserError):
    """A mask allows no feature at the last prompt token of any item."""

    def __init__(self, mask: str, site: Site | str, items: int) -> None:
        super().__init__(
            f"mask {mask}",
            f"it allows no live feature at {site}, at the last prompt token of any of {items} items",
            "choose another mask, or an SAE trained at this site of this model",
        )


def candidate_order(
    model: LanguageModel, dictionary: Dictionary, rule: CandidateRule, *, site: Site | str, seed: int = 0
) -> list[int]:
    """Every feature that ever fired, in the order in which a rule tries them.

    Args:
        model: the model, for `top-confidence`.
        dictionary: whose features.
        rule: `top-confidence` or `random`; without statistics the latter draws from all features.
        site: where features are amplified.
        seed: of the draw.

    Raises:
        UserError: `top-confidence` without feature statistics, or no feature ever fired.
    """
    if rule == "random":
        live = DirectionTable.of(dictionary).live_ids().numpy()
        return np.random.default_rng([seed, 12]).permutation(live).tolist()
    if dictionary.feature_stats is None:
        raise UserError(
            "the order by delta-confidence",
            "the SAE comes without feature statistics (feature_stats.parquet), so it is unknown how strongly its "
            "features fire",
            "compute them with `trimtab evaluate core --sae SAE --text FILE --write-stats SAE`, or choose candidates "
            "random and masks other than top-confidence",
        )
    return [int(feature) for feature in rank(model, dictionary, "delta-confidence", site=site).feature]


def first_allowed(
    order: Sequence[int],
    count: int,
    allowed: Bool[NDArray[np.bool_], "P n"],
    *,
    rule: CandidateRule,
    mask: str,
    site: Site | str,
) -> Candidates:
    """The first features of an order that a mask allows on at least one item.

    Args:
        order: as `candidate_order` gives it.
        count: how many; fewer are taken where no more are allowed.
        allowed: what the mask allows at each item's last prompt token.
        rule: the order's, for the report.
        mask, site: for the message.

    Raises:
        UserError: the dictionary has fewer features than `count`, or the mask allows none of the order.
    """
    check_count(count, allowed.shape[1])
    anywhere = set(np.flatnonzero(allowed.any(axis=0)).tolist())
    found = tuple(feature for feature in order if feature in anywhere)[:count]
    if not found:
        raise NothingAllowedError(mask, site, len(allowed))
    return Candidates(found, allowed.shape[1], rule)


def check_count(count: int, n: int | None = None) -> None:
    """Raise a `UserError` if so many features cannot be tried, of n if that is known."""
    if count < 1:
        raise UserError(f"features {count}", "at least one must be tried", "give 1 or more")
    if n is not None and count > n:
        raise UserError(f"features {count}", f"the SAE has {n:,}", f"give at most {n}")
