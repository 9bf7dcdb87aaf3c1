"""Feature absorption where the truth is known (after Chanin et al. 2024, "A is for Absorption", arXiv 2409.14507).

Where a feature (the child) fires only together with another (the parent), a dictionary saves an active latent by
letting the child's latent stand for both and the parent's fall silent: the parent then has a hole where its child
fires. Chanin et al. find such tokens with a probe for the parent; here parent and child are known.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from trimtab.evaluation.ground_truth_metrics import Matching

CARRIED = 0.5
"""A child's latent that stands for the parent at least this well, measured by how it stands for the child, has absorbed
the parent."""


class Absorption(NamedTuple):
    """Means over pairs of child and parent that fire together; NaN if there is none.

    The parent's latent is its match, if that has a cosine of at least the threshold; a parent without one is silent
    everywhere, for what its children's latents took over altogether is absorbed too. The child's latent is the learned
    feature nearest to the child.
    """

    rate: float
    """Share of the rows where parent and child fire on which the parent's latent is silent and the child's latent
    carries the parent: its decoder row is α·child + β·parent by least squares, and β over the parent's magnitude is at
    least `CARRIED` times α over the child's. The size of its code does not matter, so that codes may shrink."""
    missed_with_child: float
    """Share of those rows on which the parent's latent is silent, whatever the child's latent does."""
    missed_alone: float
    """Share of the rows where the parent fires without any child on which its latent is silent."""


class AbsorptionAccumulator:
    """Collects `Absorption` from one block of rows after another.

    Args:
        learned: unit directions of the learned features.
        true: unit directions of the true ones.
        parent: index of each true feature's parent, −1 for none.
        matching: of true with learned features.
        threshold: cosine from which a parent's match is its latent.
    """

    def __init__(
        self,
        learned: Float[Tensor, "n d"],
        true: Float[Tensor, "m d"],
        parent: Int[ndarray, " m"],
        matching: Matching,
        threshold: float,
    ) -> None:
        child = np.flatnonzero(parent >= 0)
        self._child, self._parent = torch.from_numpy(child), torch.from_numpy(parent[child])
        latent = np.where(matching.cosine >= threshold, matching.learned, -1)[parent[child]]
        self._parent_latent = torch.from_numpy(latent)
        cosine = true[self._child] @ learned.T
        self._child_latent = cosine.argmax(dim=1) if len(child) else self._child
        self._weights = _weights(learned[self._child_latent], true[self._child], true[self._parent])
        self._counts = torch.zeros(5, len(child), dtype=torch.float64)

    def update(self, f: Float[Tensor, "r n"], a: Float[Tensor, "r m"]) -> None:
        """Count one block.

        Args:
            f: codes of the learned features, in units of their unit directions.
            a: true magnitudes.
        """
        truth = a > 0
        with_child = truth[:, self._child] & truth[:, self._parent]
        children = torch.zeros_like(a).index_add_(1, self._parent, truth[:, self._child].to(a))
        alone = (truth & (children == 0))[:, self._parent]
        silent = (f[:, self._parent_latent.clamp_min(0)] <= 0) | (self._parent_latent < 0)
        of_child, of_parent = self._weights
        carried = of_parent * a[:, self._child] >= CARRIED * of_child * a[:, self._parent]
        carried &= (f[:, self._child_latent] > 0) & (of_child > 0)
        terms = (with_child, with_child & silent, with_child & silent & carried, alone, alone & silent)
        self._counts += torch.stack([term.sum(0) for term in terms])

    def result(self) -> Absorption:
        """Rates over all rows."""
        with_child, silent, absorbed, alone, silent_alone = self._counts
        return Absorption(
            rate=_mean_ratio(absorbed, with_child),
            missed_with_child=_mean_ratio(silent, with_child),
            missed_alone=_mean_ratio(silent_alone, alone),
        )


class _Weights(NamedTuple):
    """A latent's direction as a sum of a child's and a parent's, by least squares."""

    of_child: Float[Tensor, " p"]
    of_parent: Float[Tensor, " p"]


def _weights(latent: Float[Tensor, "p d"], child: Float[Tensor, "p d"], parent: Float[Tensor, "p d"]) -> _Weights:
    overlap = (child * parent).sum(1)
    along_child, along_parent = (latent * child).sum(1), (latent * parent).sum(1)
    rest = (1 - overlap**2).clamp_min(1e-6)
    return _Weights((along_child - overlap * along_parent) / rest, (along_parent - overlap * along_child) / rest)


def _mean_ratio(top: Tensor, bottom: Tensor) -> float:
    seen = bottom > 0
    return float((top[seen] / bottom[seen]).mean()) if seen.any() else float("nan")
