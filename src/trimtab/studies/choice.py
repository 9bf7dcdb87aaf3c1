"""Choosing direction, subset and dose from texts on validation prompts.

The utility of a configuration is the mean over its rows of (rate at which the steered feature fires − its rate
unsteered), rows whose negative log-likelihood left the unsteered texts' band counting 0: effect that costs the text is
no effect. One dose is chosen for all arms, the one at which the best configurations of both criteria do best together,
so that arms are compared at equal dose; at that dose each criterion takes its own best direction and subset size.
Ties go to the earlier dose, direction and size of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from trimtab.studies.texts import Texts

BAND = (0.05, 0.95)
"""Quantiles of the unsteered texts' mean negative log-likelihood that bound ordinary text."""


class Band(NamedTuple):
    """Range of ordinary negative log-likelihoods, in nats per token."""

    low: float
    high: float

    @classmethod
    def of(cls, nll: ndarray) -> Band:
        """The band of unsteered texts."""
        low, high = np.quantile(nll, BAND)
        return cls(float(low), float(high))

    def holds(self, nll: ndarray) -> ndarray:
        """Whether each text is inside."""
        return (nll >= self.low) & (nll <= self.high)


class BaseRates(NamedTuple):
    """How often each feature fires in the unsteered continuation of each prompt and sample."""

    rate: ndarray  # [P, samples, n]

    @classmethod
    def of(cls, unsteered: Texts, counts: ndarray) -> BaseRates:
        """From counts of tokens `[N, n]`; every prompt has as many samples."""
        shape = int(unsteered.prompt.max()) + 1, int(unsteered.replicate.max()) + 1, counts.shape[1]
        rate = np.full(shape, np.nan)
        rate[unsteered.prompt, unsteered.replicate] = counts / unsteered.token_ids.shape[1]
        assert not np.isnan(rate).any()
        return cls(rate)

    def effect(self, texts: Texts) -> ndarray:
        """`[N]` rate of each row's feature minus its rate unsteered, same prompt and same random draws."""
        return texts.rate - self.rate[texts.prompt, texts.replicate, texts.feature]


class Cell(NamedTuple):
    """One configuration on validation prompts."""

    criterion: str
    direction: str
    size: int
    dose: float
    utility: float
    effect: float
    """Mean change of rate, whatever became of the text."""
    in_band: float
    n_rows: int


class Choice(NamedTuple):
    """What validation chose."""

    dose: float
    cells: Mapping[str, Cell]
    """By criterion."""
    grid: tuple[Cell, ...]
    """Everything that was tried."""


def choose(
    texts: Texts,
    effect: ndarray,
    in_band: ndarray,
    lists: Mapping[str, tuple[str, str]],
    sizes: Sequence[int],
    doses: Sequence[float],
) -> Choice:
    """Choose from a grid.

    Args:
        texts: rows whose `arm` names a list of candidates, `rank` the feature's place in it.
        effect: `[N]` change of rate.
        in_band: `[N]` whether the text is ordinary.
        lists: criterion and direction of every list.
        sizes: subsets are the first so many of a list.
        doses: in units of ‖x‖.
    """
    grid = []
    for dose in doses:
        for name, (criterion, direction) in lists.items():
            for size in sizes:
                rows = (texts.arm == name) & (texts.rank < size) & np.isclose(texts.dose, dose)
                utility = float((effect * in_band)[rows].mean())
                grid.append(
                    Cell(
                        criterion, direction, size, dose, utility,
                        float(effect[rows].mean()), float(in_band[rows].mean()), int(rows.sum()),
                    )
                )  # fmt: skip
    criteria = list(dict.fromkeys(criterion for criterion, _ in lists.values()))

    def best(criterion: str, dose: float) -> Cell:
        return max((c for c in grid if c.criterion == criterion and c.dose == dose), key=lambda c: c.utility)

    dose = max(doses, key=lambda d: sum(best(criterion, d).utility for criterion in criteria))
    return Choice(dose, {criterion: best(criterion, dose) for criterion in criteria}, tuple(grid))
