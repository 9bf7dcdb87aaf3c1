"""How often features fire: the distribution of their rates, on a log scale since rates span orders of magnitude."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from trimtab.stats import number_text

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BIN = 0.25
"""Width of the histogram's bins, in decades."""
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class FeatureDensity:
    """Distribution of log10 of the firing rates of the features that fired; the others are counted apart."""

    quantiles: dict[str, float]
    """log10 firing rate by share of the features that fired (`0.5`); empty if none did."""
    log10_edges: tuple[float, ...]
    """Bounds of the bins in log10, from the first at or below one firing to 0; a rate on a bound is in the upper bin,
    and a rate of 1 in the last."""
    counts: tuple[int, ...]
    """Features in each bin."""
    never: int
    """Features that never fired."""
    n_rows: int
    """Rows that rates were counted on: 1/n_rows is the least rate that can be seen."""

    def render(self) -> str:
        """Quantiles and a histogram in one line."""
        if not self.quantiles:
            return "no feature fired"
        found = ", ".join(f"{float(q):.0%} {number_text(value, '.2f')}" for q, value in self.quantiles.items())
        top = max(self.counts)
        bars = "".join(_BARS[math.ceil(count * (len(_BARS) - 1) / top)] for count in self.counts)
        return f"{found}  {self.log10_edges[0]:g} {bars} {self.log10_edges[-1]:g}"


def feature_density(firing_rate: Float[ndarray, " n"], n_rows: int) -> FeatureDensity:
    """The distribution of features' firing rates, shares of so many rows."""
    rate = np.asarray(firing_rate, dtype=np.float64)
    fired = np.log10(rate[rate > 0])
    low = math.floor(-math.log10(max(n_rows, 2)) / BIN)
    edges = np.arange(low, 1) * BIN
    counts, _ = np.histogram(np.clip(fired, edges[0], 0), bins=edges)
    return FeatureDensity(
        quantiles={f"{q:g}": float(np.quantile(fired, q)) for q in QUANTILES} if len(fired) else {},
        log10_edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        never=int((rate == 0).sum()),
        n_rows=n_rows,
    )
