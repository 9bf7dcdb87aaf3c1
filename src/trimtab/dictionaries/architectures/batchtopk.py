"""The BatchTopK SAE: a batch of B rows keeps its k·B largest codes (Bussmann et al. 2024, arXiv 2412.06410).

Rows may use more or fewer than k features. Inference must not depend on the other rows of a batch, so that after
training one threshold is set on held-out rows such that their mean number of active features is k; the SAE is a
JumpReLU SAE from then on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries.active import pairs_above
from trimtab.dictionaries.architectures.jumprelu import JumpReLU
from trimtab.dictionaries.sparse import ActivePairs
from trimtab.dictionaries.topk_like import TopKLike, TopKLikeConfig
from trimtab.dictionaries.trainable import Loss

FLOOR = 0.9
"""Codes above this share of the smallest that the last batch kept are candidates; if they are fewer than k·B, a second
pass finds the others."""


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(TopKLikeConfig):
    """Training of a BatchTopK SAE."""

    threshold_momentum: float = 0.99
    """How much of the running threshold each batch keeps."""


class TrainableBatchTopK(TopKLike):
    """BatchTopK in training. `threshold` is the running mean of the smallest code that a batch keeps."""

    architecture = "batchtopk"
    config_class = BatchTopKConfig
    inference_class = JumpReLU
    config: BatchTopKConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    threshold: Tensor
    _smallest_kept: Tensor

    def __init__(self, config: BatchTopKConfig, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, d, seed=seed, dtype=dtype)
        self.register_buffer("threshold", torch.zeros((), dtype=dtype))
        # By the last batch; no part of the state: it says where to look first.
        self.register_buffer("_smallest_kept", torch.zeros((), dtype=dtype), persistent=False)

    def loss(self, x: Float[Tensor, "B d"]) -> Loss:
        """‖x − x̂‖² + α·AuxK, in which f keeps the k·B largest positive entries of h."""
        h = self.pre_activations(x)
        f = self.kept(h)
        error = x - self.reconstruct(f)
        squared_error, aux = error.square().sum(1).mean(), self.aux_loss(h, error)
        return Loss(squared_error + self.config.aux_coefficient * aux, squared_error, f, aux=aux)

    def kept(self, h: Float[Tensor, "B n"]) -> Float[Tensor, "B n"]:
        """The codes of a batch: its k·B largest pre-activations, negative ones set to 0."""
        return h.relu() * (h >= h.flatten().topk(self.k * len(h), sorted=False).values.amin())

    def after_step(self, codes: Tensor, l0: Float[Tensor, ""]) -> None:
        """Move the running threshold towards the smallest code that was kept."""
        is_kept = codes > 0
        smallest = codes.masked_fill(~is_kept, torch.inf).amin() if codes.numel() else codes.new_full((), torch.inf)
        smallest.masked_fill_(~is_kept.any(), 0.0)
        self._smallest_kept.copy_(smallest)
        share = torch.full_like(self.threshold, 1 - self.config.threshold_momentum)
        self.threshold.lerp_(smallest.to(self.threshold.dtype), share.masked_fill_(self.threshold <= 0, 1.0))

    @torch.no_grad()
    def active_pairs(self, z: Float[Tensor, "B d"]) -> ActivePairs:
        wanted = len(z) * self.k
        pairs = self._candidates(z, wanted)
        surplus = len(pairs.value) - wanted
        if surplus <= 0:
            return pairs
        return pairs.where(pairs.value >= pairs.value.kthvalue(surplus + 1).values)

    @torch.no_grad()
    def calibrate(self, rows: Float[Tensor, "m d"]) -> dict[str, float]:
        """Set the threshold so that these held-out rows have k active features each, on average."""
        wanted = len(rows) * self.config.k
        value = self._candidates(self.encoder_input(rows), wanted + 1).value
        surplus = len(value) - wanted
        if surplus > 0:
            self.threshold.copy_((value.kthvalue(surplus).values + value.kthvalue(surplus + 1).values) / 2)
        else:
            self.threshold.zero_()
        return {"l0": float((value > self.threshold).sum()) / len(rows), "threshold": float(self.threshold)}

    def inference_weights(self) -> dict[str, Tensor]:
        """As JumpReLU's. Decoder rows have norm 1, so that one threshold is right for all features."""
        threshold = self.threshold.expand(self.config.n_features).clone()
        return {**super().inference_weights(), "threshold": threshold}

    def _candidates(self, z: Tensor, wanted: int) -> ActivePairs:
        """All positive codes that can be among the `wanted` largest: those above a floor that leaves enough."""
        smallest_kept = float(self._smallest_kept)
        if smallest_kept > 0:
            found = self._above(z, FLOOR * smallest_kept)
            if len(found.value) >= wanted:
                return found
        floor = self._floor_from_block(z, wanted)
        found = self._above(z, floor)
        return found if len(found.value) >= wanted or floor == 0 else self._above(z, 0.0)

    def _floor_from_block(self, z: Tensor, wanted: int) -> float:
        """A floor above which the first block has four times its share."""
        block = z[: self.config.block_rows]
        h = self.encoder()(block).flatten()
        rank = min(len(h), 4 * wanted * len(block) // len(z) or 1)
        return max(0.0, float(h.kthvalue(len(h) - rank + 1).values))

    def _above(self, z: Tensor, floor: float) -> ActivePairs:
        pairs = pairs_above(self.encoder(), z, floor)
        return pairs._replace(value=pairs.value.relu())
