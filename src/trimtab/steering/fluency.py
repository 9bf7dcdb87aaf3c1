"""Whether texts are still ordinary: the likelihoods that unsteered texts have, and how much texts repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

BAND = (0.05, 0.95)
"""Quantiles of the unsteered texts' mean negative log-likelihood that bound ordinary text."""


class Band(NamedTuple):
    """Range of ordinary negative log-likelihoods, in nats per token."""

    low: float
    high: float

    @classmethod
    def of(cls, nll: ArrayLike) -> Band:
        """The band of unsteered texts."""
        low, high = np.quantile(np.asarray(nll, dtype=np.float64), BAND)
        return cls(float(low), float(high))

    def holds(self, nll: ArrayLike) -> NDArray[np.bool_]:
        """Whether each text is inside."""
        values = np.asarray(nll, dtype=np.float64)
        return (values >= self.low) & (values <= self.high)


def repetition(tokens: Sequence[int]) -> float:
    """Share of 4-grams that occurred before; 0 for a shorter text."""
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
