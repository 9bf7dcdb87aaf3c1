"""From a headroom table to the lines that a policy stands between.

- the ceiling: items that *some* allowed feature solves, beside the ceiling of as many random directions of equal norm,
  item by item;
- the best static feature: chosen on some items, scored on others;
- the most active feature of each item;
- a readout: a regression from the activation to the table, fitted on some items, that picks each other item's feature:
  the best that one step could learn from this state.

If the best static feature reaches the ceiling there is nothing to learn, and if nothing flips there is nothing to gain.
With some features tried, the ceiling is a lower bound on that over all; and where answers are longer than a token a
policy, which may change its feature from token to token, may do better than the ceiling, too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from trimtab.policies.headroom.result import Headroom
from trimtab.policies.headroom.table import HeadroomTable
from trimtab.stats import Interval, best_of_some, bootstrap_mean

FOLDS = 5
RIDGE = tuple(10.0**k for k in range(-2, 5))
"""Penalties of the readout that are tried, as multiples of the mean eigenvalue."""
Rewards = Float[np.ndarray, " P"]
Fit = Callable[[NDArray[np.intp], NDArray[np.intp]], Rewards]
"""From the indices of items that may be looked at, and of those to score, to the latter's rewards."""


def headroom(table: HeadroomTable, *, site: str, dose: float, unit: str, mask: str, seed: int = 0) -> Headroom:
    """The lines of a headroom table.

    Args:
        table: as `headroom_table` gives it.
        site, dose, unit, mask: what it was made with, for the report.
        seed: of folds and bootstrap.
    """
    items, n = table.reward.shape
    strength = np.where(table.allowed, table.strength, -1.0)
    active = np.where(strength.max(1) > 0, table.reward[np.arange(items), strength.argmax(1)], table.unsteered)
    chance = best_of_some(np.maximum(table.random - table.unsteered[:, None], 0), table.random_counts)
    # One feature for all, the best of the other folds; where the mask forbids it, nothing is edited.
    static = cross_fit(items, lambda fit, test: table.earned[test, int(table.earned[fit].mean(0).argmax())], seed)

    def mean(values: NDArray[np.floating]) -> Interval:
        return bootstrap_mean(np.asarray(values, dtype=np.float64), seed=seed)

    return Headroom(
        site=site,
        dose=dose,
        unit=unit,
        mask=mask,
        items=items,
        features=n,
        of_features=table.candidates.of,
        candidates=table.candidates.rule,
        scheme=table.scheme,
        allowed_per_item=float(table.allowed.sum(1).mean()),
        random_per_item=float(table.random_counts.mean()),
        unsteered=mean(table.unsteered),
        ceiling=mean(np.maximum(table.earned.max(1), table.unsteered)),
        random_ceiling=mean(table.unsteered + chance),
        static=mean(static),
        most_active=mean(active),
        readout=mean(cross_fit(items, lambda fit, test: _readout(table, fit, test), seed)),
        flipped_by_static=mean((static != table.unsteered).astype(float)),
    )


def cross_fit(items: int, reward: Fit, seed: int) -> Rewards:
    """Rewards of items, each chosen for by the items of the other folds.

    Args:
        items: how many.
        reward: what those that are left out earn.
        seed: of the division into 5 folds; every item is a fold of its own where there are fewer items.
    """
    order = np.random.default_rng([seed, 7]).permutation(items)
    found = np.zeros(items)
    for test in np.array_split(order, min(FOLDS, items)):
        found[test] = reward(np.setdiff1d(order, test), test)
    return found


def _readout(table: HeadroomTable, fit: NDArray[np.intp], test: NDArray[np.intp]) -> Rewards:
    """Ridge regression from activations to what each feature adds; the largest predicted gain is taken, if above 0.

    The penalty is chosen inside the fitted items, by the reward that the choice would have earned.
    """
    gain = (table.earned - table.unsteered[:, None]).astype(np.float64)
    if len(fit) == 1:  # nothing to choose a penalty by
        return _picked(table, gain, fit, test, RIDGE[-1])
    inner = np.array_split(fit, min(4, len(fit)))
    earned = {
        ridge: sum(float(_picked(table, gain, np.setdiff1d(fit, part), part, ridge).sum()) for part in inner)
        for ridge in RIDGE
    }
    return _picked(table, gain, fit, test, max(RIDGE, key=lambda ridge: (earned[ridge], ridge)))


def _picked(
    table: HeadroomTable,
    gain: Float[np.ndarray, "P n"],
    fit: NDArray[np.intp],
    test: NDArray[np.intp],
    ridge: float,
) -> Rewards:
    mean, scale = table.x[fit].mean(0), table.x[fit].std(0) + 1e-6
    a, b = ((table.x[part] - mean) / scale for part in (fit, test))
    kernel = a.astype(np.float64) @ a.T
    penalty = ridge * max(float(np.trace(kernel)) / len(fit), 1e-12)
    intercept = gain[fit].mean(0)
    weights = np.linalg.solve(kernel + penalty * np.eye(len(fit)), gain[fit] - intercept)
    predicted = np.where(table.allowed[test], b.astype(np.float64) @ a.T @ weights + intercept, -np.inf)
    chosen = table.reward[test, predicted.argmax(1)]
    return np.where(predicted.max(1) > 0, chosen, table.unsteered[test]).astype(np.float64)


def chosen_features(table: HeadroomTable, count: int) -> list[int]:
    """The features with the largest mean reward, best first."""
    best = np.argsort(-table.reward.mean(0), kind="stable")[:count]
    return [table.candidates.features[k] for k in best]
