"""The one dense product of a training step, encoder inputs to all pre-activations, by blocks; quantiles of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from trimtab.dictionaries.precision import Precision, product


@dataclass
class DenseEncoder:
    """h = z Wᵀ + b.

    Args:
        W: encoder rows, one per feature.
        b: one bias per feature.
        precision: of the product; not `auto`.
        block_rows: rows multiplied at once.
        screened: whether entries are found by way of bfloat16 where an exact product is asked for; None: where that is
            known to be faster.
    """

    W: Float[Tensor, "n d"]
    b: Float[Tensor, " n"]
    precision: Precision = "fp32"
    block_rows: int = 512
    screened: bool | None = None

    def __post_init__(self) -> None:
        self.exact = self.precision == "fp32"
        """Whether pre-activations have the precision of the weights."""
        low = self.precision == "bf16"
        self._W, self._b = (self.W.bfloat16(), self.b.bfloat16()) if low else (self.W, self.b)

    def __call__(self, z: Float[Tensor, "B d"]) -> Float[Tensor, "B n"]:
        """Pre-activations of some rows, to find large ones by: in bfloat16 if the product is."""
        return F.linear(z.to(self._W.dtype), self._W, self._b)

    def table(self, z: Float[Tensor, "B d"]) -> Float[Tensor, "B n"]:
        """Pre-activations of some rows, to be used: in the dtype of the weights."""
        return product(z, self._W.T, "bf16").add_(self.b) if self.precision == "bf16" else self(z)


QUANTILE_ROWS = 4096
"""Rows that thresholds are found on; sorting more takes longer than many steps."""
FEATURES_AT_ONCE = 512
"""Features whose pre-activations on a whole sample are held at once."""


def exceeded_on(
    z: Float[Tensor, "m d"], W: Float[Tensor, "n d"], share: float, b: Float[Tensor, " n"] | None = None
) -> Float[Tensor, " n"]:
    """The threshold, at least 0, that each feature's z Wᵀ + b exceeds on this share of the (first) rows."""
    z = z[:QUANTILE_ROWS]
    rank = max(1, len(z) - max(1, round(share * len(z))))
    biases = W.new_zeros(len(W)) if b is None else b
    found = [
        torch.addmm(bias, z, rows.T).kthvalue(rank, dim=0).values
        for rows, bias in zip(W.split(FEATURES_AT_ONCE), biases.split(FEATURES_AT_ONCE), strict=True)
    ]
    return torch.cat(found).clamp_min(0.0)
