"""The BatchTopK SAE: a batch of B rows keeps its k·B largest codes (Bussmann et al. 2024, arXiv 2412.06410).

Rows may use more or fewer than k features. Inference must not depend on the other rows of a batch, so that after
training one threshold is set on held-out rows such that their mean number of active features is k; the SAE is a
JumpReLU SAE from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.jumprelu import JumpReLU
from trimtab.dictionaries.sparse import ActivePairs
from trimtab.dictionaries.trainable import SparseSAEConfig, TrainableSAE

FLOOR = 0.75
"""Codes above this share of the running threshold are candidates; fewer candidates than k·B are a second pass."""


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(SparseSAEConfig):
    """Training of a BatchTopK SAE."""

    threshold_momentum: float = 0.99
    """How much of the running threshold each batch keeps."""


class Candidates(NamedTuple):
    """Codes above a floor, row after row."""

    value: Float[Tensor, " m"]
    place: Int[Tensor, " m"]
    """Row · n + feature."""


class TrainableBatchTopK(TrainableSAE):
    """BatchTopK in training. `threshold` is the running mean of the smallest code that a batch keeps."""

    architecture = "batchtopk"
    config: BatchTopKConfig
    threshold: Tensor

    def __init__(self, config: BatchTopKConfig, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, d, seed=seed, dtype=dtype)
        self.register_buffer("threshold", torch.zeros((), dtype=dtype))

    def active_pairs(self, z: Float[Tensor, "B d"]) -> ActivePairs:
        n, rows = self.config.n_features, z.shape[0]
        value, place = self._candidates(z, rows * self.k)
        if len(value) > rows * self.k:
            smallest = value.kthvalue(len(value) - rows * self.k + 1).values
            kept = value >= smallest
            value, place = value[kept], place[kept]
        else:
            smallest = value.min() if len(value) else self.threshold.new_zeros(())
        known = self.threshold > 0
        momentum = self.config.threshold_momentum if known else 0.0
        self.threshold.lerp_(smallest, 1 - momentum)
        row = place // n
        start = torch.zeros(rows + 1, dtype=torch.long, device=z.device)
        torch.cumsum(torch.bincount(row, minlength=rows), 0, out=start[1:])
        return ActivePairs(value, place - row * n, start)

    @torch.no_grad()
    def calibrate(self, rows: Float[Tensor, "m d"]) -> dict[str, float]:
        """Set the threshold so that these held-out rows have k active features each, on average."""
        wanted = len(rows) * self.config.k
        value = self._candidates(self.encoder_input(rows), wanted + 1).value
        if len(value) > wanted:
            between = value.kthvalue(len(value) - wanted + 1).values, value.kthvalue(len(value) - wanted).values
            self.threshold.copy_((between[0] + between[1]) / 2)
        else:
            self.threshold.zero_()
        return {"l0": float((value > self.threshold).sum()) / len(rows), "threshold": float(self.threshold)}

    def export(self, info: DictionaryInfo) -> JumpReLU:
        """As JumpReLU. Decoder rows have norm 1, so that one threshold is right for all features."""
        return JumpReLU(
            **self.inference_weights(),
            threshold=self.threshold.expand(self.config.n_features).clone(),
            apply_b_dec_to_input=self.config.apply_b_dec_to_input,
            info=self.named_info(info, JumpReLU.architecture),
        )

    def _candidates(self, z: Tensor, wanted: int) -> Candidates:
        """All positive codes that can be among the `wanted` largest: those above a floor that leaves enough."""
        if self.threshold > 0 and len((found := self._above(z, FLOOR * float(self.threshold))).value) >= wanted:
            return found
        floor = self._floor_from_block(z, wanted)
        found = self._above(z, floor)
        return found if len(found.value) >= wanted or floor == 0 else self._above(z, 0.0)

    def _floor_from_block(self, z: Tensor, wanted: int) -> float:
        """A floor above which the first block has four times its share."""
        h = self._pre_activations(z[: self.config.block_rows])
        rank = min(h.numel(), 4 * wanted * len(h) // len(z) or 1)
        return max(0.0, float(h.flatten().kthvalue(h.numel() - rank + 1).values))

    def _above(self, z: Tensor, floor: float) -> Candidates:
        values, places, first = [], [], 0
        for block in z.split(self.config.block_rows):
            h = self._pre_activations(block).flatten()
            place = (h > floor).nonzero().squeeze(1)
            values.append(h[place])
            places.append(place + first * self.config.n_features)
            first += len(block)
        return Candidates(torch.cat(values), torch.cat(places))

    def _pre_activations(self, z: Tensor) -> Tensor:
        return F.linear(z, self.W_enc_rows.detach(), self.b_enc.detach())
