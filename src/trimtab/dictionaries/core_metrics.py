"""Core metrics of a dictionary on rows of activations: how well it rebuilds them, with how many features.

Sums are kept per document, so that a caller can bootstrap over documents; the explained variance is about the corpus
mean, 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖².
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from trimtab.dictionaries.sparse import SparseCodes

DENSE_RATE = 0.1
"""A feature that fires on more than this share of rows counts as dense."""


class CoreMetrics(NamedTuple):
    """Metrics over a whole corpus."""

    explained_variance: float
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean of all rows."""
    normalised_mse: float
    """Σ‖x − x̂‖² / Σ‖x‖²."""
    cosine: float
    """Mean over rows of cos(x, x̂); 0 for a row where either is zero."""
    l0: float
    """Mean number of features that fire on a row."""
    dead_share: float
    """Share of features that fired on no row."""
    dense_share: float
    """Share of features that fired on more than `DENSE_RATE` of the rows."""
    n_rows: int
    n_documents: int


@dataclass(frozen=True, kw_only=True)
class DocumentTotals:
    """Sums over each document's rows; every array but `firings` has one entry per document."""

    document: NDArray[np.int64]
    """`[D]` the ids given."""
    rows: NDArray[np.int64]
    """`[D]` number of rows."""
    residual: NDArray[np.float64]
    """`[D]` Σ‖x − x̂‖²."""
    variance: NDArray[np.float64]
    """`[D]` Σ‖x − x̄‖², x̄ the mean over all documents."""
    energy: NDArray[np.float64]
    """`[D]` Σ‖x‖²."""
    cosine: NDArray[np.float64]
    """`[D]` Σ cos(x, x̂)."""
    active: NDArray[np.int64]
    """`[D]` Σ number of features that fire."""
    firings: NDArray[np.int64]
    """`[n]` rows on which each feature fired, over all documents."""

    def metrics(self) -> CoreMetrics:
        """The metrics over all documents. Raises a `ValueError` if there are no rows."""
        n_rows = int(self.rows.sum())
        if n_rows == 0:
            raise ValueError("no rows were counted")
        residual, variance = self.residual.sum(), self.variance.sum()
        rate = self.firings / n_rows
        return CoreMetrics(
            explained_variance=1 - _ratio(residual, variance),
            normalised_mse=_ratio(residual, self.energy.sum()),
            cosine=float(self.cosine.sum()) / n_rows,
            l0=int(self.active.sum()) / n_rows,
            dead_share=float((self.firings == 0).mean()),
            dense_share=float((rate > DENSE_RATE).mean()),
            n_rows=n_rows,
            n_documents=len(self.document),
        )


class CoreMetricsAccumulator:
    """Collects `DocumentTotals` of rows of width d from one batch after another, in float64 on a device."""

    def __init__(self, d: int, n_features: int, device: str | torch.device = "cpu") -> None:
        self._slots: dict[int, int] = {}
        self._sums = torch.zeros(0, 6, dtype=torch.float64, device=device)  # columns as `update` stacks them
        self._x = torch.zeros(0, d, dtype=torch.float64, device=device)
        self._origin: Tensor | None = None
        self._firings = torch.zeros(n_features, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "r d"],
        x_hat: Float[Tensor, "r d"],
        codes: Float[Tensor, "r n"] | SparseCodes | tuple[Tensor, Tensor],
        documents: Int[Tensor, " r"],
    ) -> None:
        """Count one batch.

        Args:
            x: activations.
            x_hat: their reconstructions.
            codes: dense codes, or (values `[r, k]`, indices `[r, k]`); a feature listed with code 0 does not fire.
            documents: id of the document that each row belongs to; a document may go on in later batches.
        """
        if len(x) == 0:
            return
        device = self._sums.device
        x, x_hat = x.to(device, torch.float64), x_hat.to(device, torch.float64)
        if self._origin is None:  # sums of squares are taken about a point near the mean, lest their difference cancel
            self._origin = x.mean(0)
        if isinstance(codes, Tensor):
            active = codes > 0  # counted where the codes are: they are many times as large as the rows
            self._firings += active.sum(0).to(device)
        else:
            values, indices = codes
            active = values > 0
            self._firings += torch.bincount(indices[active], minlength=len(self._firings)).to(device)
        centred = x - self._origin
        residual, energy = (x - x_hat).square().sum(1), x.square().sum(1)
        cosine = torch.cosine_similarity(x, x_hat, dim=1, eps=1e-30)
        sums = [torch.ones_like(energy), residual, centred.square().sum(1), energy, cosine, active.sum(1).to(x)]
        slots = self._slots_of(documents)
        self._sums.index_add_(0, slots, torch.stack(sums, 1))
        self._x.index_add_(0, slots, centred)

    def totals(self) -> DocumentTotals:
        """The sums of everything counted so far."""
        sums, x = self._sums[: len(self._slots)], self._x[: len(self._slots)]
        rows, residual, centred, energy, cosine, active = sums.unbind(1)
        mean = x.sum(0) / rows.sum().clamp_min(1)  # x̄ − origin
        variance = centred - 2 * x @ mean + rows * mean.square().sum()
        return DocumentTotals(
            document=np.array(list(self._slots), dtype=np.int64),
            rows=rows.long().cpu().numpy(),
            residual=residual.cpu().numpy(),
            variance=variance.clamp_min(0).cpu().numpy(),
            energy=energy.cpu().numpy(),
            cosine=cosine.cpu().numpy(),
            active=active.long().cpu().numpy(),
            firings=self._firings.cpu().numpy(),
        )

    def metrics(self) -> CoreMetrics:
        """The metrics of everything counted so far."""
        return self.totals().metrics()

    def _slots_of(self, documents: Tensor) -> Tensor:
        """Each row's place in the sums; new documents get the next free one."""
        ids, inverse = torch.unique(documents.to(self._sums.device), return_inverse=True)
        slots = [self._slots.setdefault(i, len(self._slots)) for i in ids.tolist()]
        if len(self._slots) > len(self._sums):
            more = max(len(self._slots) - len(self._sums), len(self._sums))
            self._sums = torch.cat([self._sums, self._sums.new_zeros(more, self._sums.shape[1])])
            self._x = torch.cat([self._x, self._x.new_zeros(more, self._x.shape[1])])
        return torch.tensor(slots, device=self._sums.device)[inverse]


def _ratio(numerator: float, denominator: float) -> float:
    """0/0 is 0: nothing to explain, nothing missed."""
    if denominator == 0:
        return 0.0 if numerator == 0 else float("inf")
    return float(numerator / denominator)
