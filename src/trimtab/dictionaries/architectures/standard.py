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
from trimtab.dictionaries.penalised import PenalisedConfig, ReLULike
from trimtab.dictionaries.sae import SAE, columns
from trimtab.dictionaries.trainable import Loss


class Standard(SAE):
    """ReLU SAE for inference."""

    architecture = "standard"
    shapes: ClassVar = {"W_enc": "d n", "b_enc": "n", "W_dec": "n d", "b_dec": "d"}
    b_enc: nn.Parameter

    def codes(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"] | None) -> Float[Tensor, "... m"]:
        return (self.encoder_input(x) @ columns(self.W_enc, ids) + columns(self.b_enc, ids)).relu()


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(PenalisedConfig):
    """Training of a ReLU SAE.

    Nothing revives dead features, as in Anthropic's recipe of April 2024; what keeps them alive is that the penalty
    rises slowly (`sparsity_warmup_share`) and that an L0 target is approached from above.
    """

    decoder_norm: Literal["unit", "free"] = "unit"
    """Decoder rows of norm 1, or free ones by whose norm the penalty is weighted. Unit rows are the default because
    codes and weights then mean the same in every architecture here."""


class TrainableReLU(ReLULike):
    """ReLU SAE in training."""

    architecture = "relu"
    config_class = ReLUConfig
    inference_class = Standard
    config: ReLUConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def loss(self, x: Float[Tensor, "B d"]) -> Loss:
        """‖x − x̂‖² + λ Σ f_i ‖W_dec[i]‖, in which the norms are 1 unless they are free."""
        f = self.pre_activations(x).relu()
        squared_error = (x - self.reconstruct(f)).square().sum(1).mean()
        size = f * self.W_dec.norm(dim=1) if self.free else f
        sparsity = (self.control.weight * self.penalty(size).sum(1).mean()).to(x.dtype)
        return Loss(squared_error + sparsity, squared_error, f, sparsity=sparsity)

    def penalty(self, size: Values) -> Values:
        """What a code of this size costs, before the weight."""
        return size

    def penalty_slope(self, size: Values) -> Values | float:
        """The derivative of `penalty`."""
        return 1.0

    @property
    def free(self) -> bool:
        """Whether decoder rows may have any norm."""
        return self.config.decoder_norm == "free"

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "B d"]) -> Loss:
        active, norms = self.active(x), self.norms()
        f = active.h
        size = f * active.of_feature(norms) if self.free else f
        weight = (self.control.weight / len(x)).to(x.dtype)
        slope = self.penalty_slope(size) * weight
        decoded = active.decode(f, self.W_dec)
        error = decoded.x + self.b_dec - x
        grad = error * (2 / len(x))
        by_f = decoded.dot(grad).add_(slope * active.of_feature(norms) if self.free else slope)
        self.b_enc.grad = self.fill_gradients(active, f, by_f, grad, self.encoder_input(x))
        if self.free:
            assert self.W_dec.grad is not None
            self.W_dec.grad.addcmul_(self.W_dec, (active.by_feature(slope * f) / norms)[:, None])
        squared_error = error.square().sum() / len(x)
        sparsity = active.total(self.penalty(size)) * weight
        return Loss(squared_error + sparsity, squared_error, f, sparsity=sparsity, fired=active.fired(f))

    def active(self, x: Float[Tensor, "B d"]) -> Active:
        """The pairs with a positive pre-activation, which is their code."""
        return active_above(self.encoder(), self.encoder_input(x), 0.0, execution=self.execution)

    def norms(self) -> Float[Tensor, " n"]:
        """‖W_dec[i]‖, to divide by."""
        return self.W_dec.norm(dim=1).clamp_min(torch.finfo(self.W_dec.dtype).tiny)

    def project_gradients(self) -> None:
        if not self.free:
            super().project_gradients()

    def constrain(self) -> None:
        if not self.free:
            super().constrain()

    def export(self, info: DictionaryInfo) -> SAE:
        """As Standard, with decoder rows of norm 1."""
        sae = super().export(info)
        return fold_norms(sae) if self.free else sae
