"""The ReLU SAE: f = ReLU((x − b_dec) W_enc + b_enc) (Bricken et al. 2023, Cunningham et al. 2023).

Loss: mean over rows of ‖x − x̂‖² + λ Σ f, with decoder rows kept at norm 1, or of ‖x − x̂‖² + λ Σ f_i ‖W_dec[i]‖ with
free rows (Anthropic, Circuits Updates April 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.dictionaries.active import Active, Values, active_above
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.folding import fold_norms
from trimtab.dictionaries.l0_control import Penalised, PenalisedConfig
from trimtab.dictionaries.sae import SAE, columns
from trimtab.dictionaries.trainable import StepLoss, batch_variance
from trimtab.errors import UserError


class Standard(SAE):
    """ReLU SAE for inference.

    Args:
        W_enc, b_enc: encoder.
        W_dec, b_dec: decoder.
        apply_b_dec_to_input: whether the encoder sees x − b_dec (True) or x.
        info: where it comes from.
    """

    architecture = "standard"
    shapes: ClassVar = {"W_enc": "d n", "b_enc": "n", "W_dec": "n d", "b_dec": "d"}
    b_enc: nn.Parameter

    def __init__(
        self,
        W_enc: Float[Tensor, "d n"],
        b_enc: Float[Tensor, " n"],
        W_dec: Float[Tensor, "n d"],
        b_dec: Float[Tensor, " d"],
        *,
        apply_b_dec_to_input: bool = True,
        info: DictionaryInfo | None = None,
    ) -> None:
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        info = info or DictionaryInfo(architecture=self.architecture)
        super().__init__(weights, apply_b_dec_to_input=apply_b_dec_to_input, info=info)

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        return self._encode(x, None)

    def encode_features(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"]) -> Float[Tensor, "... m"]:
        return self._encode(x, ids)

    def _encode(self, x: Tensor, ids: Tensor | None) -> Tensor:
        return (self.encoder_input(x) @ columns(self.W_enc, ids) + columns(self.b_enc, ids)).relu()


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(PenalisedConfig):
    """Training of a ReLU SAE.

    Nothing revives dead features, as in Anthropic's recipe of April 2024; what keeps them alive is that the penalty
    rises slowly (`sparsity_warmup_share`) and that an L0 target is approached from above.
    """

    decoder_norm: Literal["unit", "free"] = "unit"
    """Decoder rows of norm 1, or free ones by whose norm the penalty is weighted. Unit rows are the
    default because codes and weights then mean the same in every architecture here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_norm not in ("unit", "free"):
            raise UserError(f"decoder_norm {self.decoder_norm!r}", "it is one of unit, free", "choose one")


class TrainableReLU(Penalised):
    """ReLU SAE in training."""

    architecture = "relu"
    config_class = ReLUConfig
    config: ReLUConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def free(self) -> bool:
        """Whether decoder rows may have any norm."""
        return self.config.decoder_norm == "free"

    def penalty(self, size: Values) -> Values:
        """What a code of this size costs, before the weight."""
        return size

    def penalty_slope(self, size: Values) -> Values | float:
        """The derivative of `penalty`."""
        return 1.0

    def penalty_weight(self, active: Active, size: Values) -> float:
        """The weight of the penalty for this batch."""
        return self.control.weight

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "B d"]) -> StepLoss:
        z, rows = self.encoder_input(x), len(x)
        active = active_above(self.encoder(), z, 0.0, dense_above=self.dense_above)
        f, norms = active.h, self._norms()
        size = f * active.of_feature(norms) if self.free else f
        weight = self.penalty_weight(active, size)
        slope = self.penalty_slope(size) * (weight / rows)
        decoded = active.decode(f, self.W_dec)
        error = decoded.x + self.b_dec - x
        grad = error * (2 / rows)
        by_f = decoded.dot(grad).add_(slope * active.of_feature(norms) if self.free else slope)
        self.W_dec.grad = active.collect(f, grad)
        if self.free:
            self.W_dec.grad.addcmul_(self.W_dec, (active.by_feature(slope * f) / norms)[:, None])
        self.W_enc_rows.grad = active.collect(by_f, z)
        self.b_enc.grad = active.by_feature(by_f)
        self.b_dec.grad = grad.sum(0)
        if self.config.apply_b_dec_to_input:
            self.b_dec.grad -= self.b_enc.grad @ self.W_enc_rows
        l0 = active.count(f) / rows
        self.control.update(l0)
        n_dead = int(self.dead_features().sum())
        self.count_fired(active.fired(f), rows)
        squared_error = error.square().sum() / rows
        sparsity = active.total(self.penalty(size)) * (weight / rows)
        return StepLoss(
            loss=squared_error + sparsity,
            squared_error=squared_error,
            variance=batch_variance(x),
            sparsity=sparsity,
            aux=sparsity.new_zeros(()),
            l0=l0,
            n_dead=n_dead,
        )

    def project_gradients(self) -> None:
        if not self.free:
            super().project_gradients()

    def constrain(self) -> None:
        if not self.free:
            super().constrain()

    def export(self, info: DictionaryInfo) -> Standard:
        """As Standard, with decoder rows of norm 1."""
        sae = Standard(
            **self.inference_weights(),
            apply_b_dec_to_input=self.config.apply_b_dec_to_input,
            info=self.named_info(info, Standard.architecture),
        )
        return fold_norms(sae) if self.free else sae

    def _norms(self) -> Float[Tensor, " n"]:
        return self.W_dec.norm(dim=1).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
