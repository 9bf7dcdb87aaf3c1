"""Choosing direction, subset and dose from texts on validation prompts.

The utility of a row is (rate at which the steered feature fires − its rate unsteered), or 0 where the text's negative
log-likelihood left the unsteered texts' band: effect that costs the text is no effect. A subset is the candidates of a
list with the largest mean utility. Which direction, size and dose are best is judged crosswise, because a subset looks
better than it is on the rows that chose it: candidates are chosen on the prompts of one half and judged on the other's.
One dose is chosen for all arms, the one at which the best configurations of all criteria do best together, so that arms
are compared at equal dose; at that dose each criterion takes its own best direction and size, and the subset that all
validation rows together choose. Random candidates go through the same choice, so that what the ranking adds to it can
be told. Ties go to the earlier dose, direction, size and candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy import ndarray


class BaseRates(NamedTuple):
    """How often each feature fires in the unsteered continuation of each prompt and sample."""

    rate: ndarray  # [P, samples, n]

    @classmethod
    def of(cls, unsteered: pd.DataFrame, counts: ndarray) -> BaseRates:
        """From counts of tokens `[N, n]`; every prompt has as many samples."""
        shape = int(unsteered.prompt.max()) + 1, int(unsteered.replicate.max()) + 1, counts.shape[1]
        rate = np.full(shape, np.nan)
        rate[unsteered.prompt, unsteered.replicate] = counts / len(unsteered.token_ids[0])
        assert not np.isnan(rate).any()
        return cls(rate)

    def effect(self, texts: pd.DataFrame) -> ndarray:
        """`[N]` rate of each row's feature minus its rate unsteered, same prompt and same random draws."""
        return texts.rate.to_numpy() - self.rate[texts.prompt, texts.replicate, texts.feature]


class Cell(NamedTuple):
    """One configuration on validation prompts."""

    criterion: str
    direction: str
    size: int
    dose: float
    features: tuple[int, ...]
    """The subset that all rows choose, best first."""
    utility: float
    """Of subsets chosen on one half of the prompts, on the other half."""
    effect: float
    """Mean change of rate, whatever became of the text, crosswise too."""
    in_band: float
    n_rows: int


class ValidationChoice(NamedTuple):
    """What validation chose."""

    dose: float
    cells: Mapping[str, Cell]
    """By criterion."""
    grid: tuple[Cell, ...]
    """Everything that was tried."""


def choose(
    texts: pd.DataFrame,
    effect: ndarray,
    in_band: ndarray,
    lists: Mapping[str, tuple[str, str]],
    sizes: Sequence[int],
    doses: Sequence[float],
) -> ValidationChoice:
    """Choose from a grid.

    Args:
        texts: rows whose `arm` names a list of candidates, `rank` the feature's place in it.
        effect: `[N]` change of rate.
        in_band: `[N]` whether the text is ordinary.
        lists: criterion and direction of every list.
        sizes: how many of a list's candidates a subset has.
        doses: in units of ‖x‖.
    """
    utility, feature = effect * in_band, texts.feature.to_numpy()
    grid = []
    for dose in doses:
        for name, (criterion, direction) in lists.items():
            rows = np.flatnonzero((texts.arm == name) & np.isclose(texts.dose, dose))
            half = texts.prompt.to_numpy()[rows] % 2
            for size in sizes:
                judged = np.concatenate(
                    [
                        rows[half == fold][np.isin(feature[rows[half == fold]], subset)]
                        for fold in (0, 1)
                        for subset in [best_features(texts, utility, rows[half != fold], size)]
                    ]
                )
                grid.append(
                    Cell(
                        criterion, direction, size, dose, best_features(texts, utility, rows, size),
                        float(utility[judged].mean()), float(effect[judged].mean()), float(in_band[judged].mean()),
                        len(judged),
                    )
                )  # fmt: skip
    criteria = list(dict.fromkeys(criterion for criterion, _ in lists.values()))

    def best(criterion: str, dose: float) -> Cell:
        return max((c for c in grid if c.criterion == criterion and c.dose == dose), key=lambda c: c.utility)

    dose = max(doses, key=lambda d: sum(best(criterion, d).utility for criterion in criteria))
    return ValidationChoice(dose, {criterion: best(criterion, dose) for criterion in criteria}, tuple(grid))


def best_features(texts: pd.DataFrame, utility: ndarray, rows: ndarray, size: int) -> tuple[int, ...]:
    """The features with the largest mean utility over some rows, best first; ties in the order of their list."""
    feature, place = texts.feature.to_numpy()[rows], texts["rank"].to_numpy()[rows]
    features = list(dict.fromkeys(feature[np.argsort(place, kind="stable")].tolist()))
    mean = {f: float(utility[rows][feature == f].mean()) for f in features}
    return tuple(sorted(features, key=lambda f: -mean[f])[:size])
