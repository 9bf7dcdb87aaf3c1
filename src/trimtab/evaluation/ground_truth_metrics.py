"""How much of a known set of features a dictionary has found: matching, recovery, splitting, firing.

Only learned features that fire count: a dead one that happens to point somewhere has found nothing. Codes are in units
of the unit direction (f_j·‖w_j‖), so that they compare with true magnitudes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor


class Matching(NamedTuple):
    """One learned feature for each true one, none used twice."""

    learned: Int[ndarray, " m"]
    """Index of the learned feature, −1 where there were too few."""
    cosine: Float[ndarray, " m"]
    """Of the matched pair; 0 where there is none."""


class Recovery(NamedTuple):
    """How well true directions are found among learned ones."""

    true_to_learned: float
    """Mean over true features of the largest cosine with a learned one (MMCS, Sharkey et al. 2022)."""
    learned_to_true: float
    """Mean over learned features of the largest cosine with a true one: low where features are invented or mixed."""
    matched_cosine: float
    """Mean cosine of matched pairs, 0 for true features left over (MCC, as in SynthSAEBench, arXiv 2602.14687)."""
    recovered: float
    """Share of true features whose match has a cosine of at least the threshold."""
    splitting: float
    """Learned features per true one: mean, over the true features that are any learned feature's nearest with a cosine
    of at least the threshold, of how many have it so; 1 without splitting, NaN if there is none."""


class FiringScores(NamedTuple):
    """How well matched features fire when true ones do: means over true features, an unmatched one scoring 0."""

    f1: float
    """F1 of (latent fires) as a detector of (feature fires)."""
    precision: float
    recall: float
    magnitude_correlation: float
    """Pearson correlation of code and true magnitude over the rows where the true feature fires; 0 where the code is
    constant there."""
    magnitude_ratio: float
    """Σ code / Σ true magnitude over the rows where both fire: below 1 where codes shrink. Matched features that fire
    only."""


def match_features(learned: Float[Tensor, "n d"], true: Float[Tensor, "m d"]) -> Matching:
    """The one-to-one matching with the largest sum of cosines (Kuhn 1955, the Hungarian method).

    Args:
        learned, true: unit directions.
    """
    cosine = (true @ learned.T).numpy()
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    matching = Matching(np.full(len(true), -1), np.zeros(len(true)))
    matching.learned[rows] = columns
    matching.cosine[rows] = cosine[rows, columns]
    return matching


def recovery(
    learned: Float[Tensor, "n d"], true: Float[Tensor, "m d"], matching: Matching, threshold: float
) -> Recovery:
    """Compare directions.

    Args:
        learned, true: unit directions; at least one of each.
        matching: of the two.
        threshold: cosine from which a true feature counts as found.
    """
    best = (learned @ true.T).max(dim=1)
    owned = np.bincount(best.indices[best.values >= threshold].numpy(), minlength=len(true))
    return Recovery(
        true_to_learned=float((true @ learned.T).amax(dim=1).mean()),
        learned_to_true=float(best.values.mean()),
        matched_cosine=float(matching.cosine.mean()),
        recovered=float((matching.cosine >= threshold).mean()),
        splitting=float(owned[owned > 0].mean()) if owned.any() else float("nan"),
    )


class FiringAccumulator:
    """Collects `FiringScores` from one block of rows after another, in float64.

    Args:
        n_true: true features.
    """

    def __init__(self, n_true: int) -> None:
        self._sums = torch.zeros(10, n_true, dtype=torch.float64)

    def update(self, f: Float[Tensor, "r m"], a: Float[Tensor, "r m"]) -> None:
        """Count one block.

        Args:
            f: codes of the matched latents, 0 where there is none.
            a: true magnitudes.
        """
        f, a = f.double(), a.double()
        fires, truth = f > 0, a > 0
        both = fires & truth
        g = f * truth
        for row, term in enumerate((truth, fires, both, a, g, a * a, g * g, g * a, a * both, f * both)):
            self._sums[row] += term.sum(0)

    def result(self) -> FiringScores:
        """Scores over all rows; true features that never fired are left out."""
        truth, fires, both, a, g, aa, gg, ga, a_both, f_both = self._sums
        seen = truth > 0
        assert seen.any(), "no true feature fired"
        recall = (both / truth)[seen]
        precision = torch.where(fires > 0, both / fires, 0)[seen]
        f1 = (2 * both / (truth + fires))[seen]
        covariance = ga - g * a / truth
        spread = ((aa - a * a / truth).clamp_min(0) * (gg - g * g / truth).clamp_min(0)).sqrt()
        correlation = torch.where(spread > 1e-9 * aa, covariance / spread, 0)[seen]
        ratio = (f_both / a_both)[both > 0]
        return FiringScores(
            f1=float(f1.mean()),
            precision=float(precision.mean()),
            recall=float(recall.mean()),
            magnitude_correlation=float(correlation.mean()),
            magnitude_ratio=float(ratio.mean()) if len(ratio) else float("nan"),
        )
