"""The Gated SAE: one path decides whether a feature fires, the other how strongly (Rajamanoharan et al. 2024a).

Both share W_enc; the magnitude path scales it per feature by exp(r_mag), as in the paper's tied parametrisation.

Loss (equation 8), with π the gate's pre-activation and decoder rows of norm 1: mean over rows of

    ‖x − x̂(f)‖² + λ Σ ReLU(π) + ‖x − x̂_frozen(ReLU(π))‖²

where x̂_frozen decodes with copies of W_dec and b_dec that get no gradient. The gate's step has no derivative, so that
W_enc and b_gate learn when to fire from the last two terms alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.dictionaries.active import active_above
from trimtab.dictionaries.penalised import PenalisedConfig, ReLULike
from trimtab.dictionaries.sae import SAE, columns
from trimtab.dictionaries.trainable import Loss


class Gated(SAE):
    """Gated SAE for inference: f = [p + b_gate > 0] · ReLU(p · exp(r_mag) + b_mag) with p = (x − b_dec) W_enc."""

    architecture = "gated"
    shapes: ClassVar = {"W_enc": "d n", "b_gate": "n", "b_mag": "n", "r_mag": "n", "W_dec": "n d", "b_dec": "d"}
    in_code_units = ("b_gate", "b_mag")
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def codes(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"] | None) -> Float[Tensor, "... m"]:
        p = self.encoder_input(x) @ columns(self.W_enc, ids)
        magnitude = (p * columns(self.r_mag, ids).exp() + columns(self.b_mag, ids)).relu()
        return torch.where(p + columns(self.b_gate, ids) > 0, magnitude, 0.0)


@dataclass(frozen=True, kw_only=True)
class GatedConfig(PenalisedConfig):
    """Training of a Gated SAE.

    Nothing revives dead features (the paper resamples them); what keeps them alive is that the penalty rises slowly
    (`sparsity_warmup_share`) and that an L0 target is approached from above.
    """


class TrainableGated(ReLULike):
    """Gated SAE in training.

    The auxiliary reconstruction reaches W_enc and b_gate and, where the encoder sees x − b_dec, b_dec through the
    encoder's input, as the paper's own reference code has it; it never reaches W_dec, b_mag or r_mag.
    """

    architecture = "gated"
    config_class = GatedConfig
    inference_class = Gated
    vectors = ("b_gate", "b_mag", "r_mag")
    firing_bias = "b_gate"
    config: GatedConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def loss(self, x: Float[Tensor, "B d"]) -> Loss:
        """‖x − x̂(f)‖² + λ Σ ReLU(π) + ‖x − x̂_frozen(ReLU(π))‖² (equation 8), f = [π > 0]·ReLU(exp(r_mag)·p + b_mag)."""
        p = self.encoder_input(x) @ self.W_enc_rows.T
        gate = (p + self.b_gate).relu()
        f = (gate > 0) * (self.r_mag.exp() * p + self.b_mag).relu()
        squared_error = (x - self.reconstruct(f)).square().sum(1).mean()
        sparsity = (self.control.weight * gate.sum(1).mean()).to(x.dtype)
        frozen = gate @ self.W_dec.detach() + self.b_dec.detach()
        aux = (x - frozen).square().sum(1).mean()
        return Loss(squared_error + sparsity + aux, squared_error, f, sparsity=sparsity, aux=aux)

    def first_codes(self, h: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return torch.where(h > 0, h - self.b_gate, 0.0)

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "B d"]) -> Loss:
        z, rows = self.encoder_input(x), len(x)
        active = active_above(self.encoder(self.b_gate), z, 0.0, execution=self.execution)
        gate = active.h
        scale = active.of_feature(self.r_mag.exp())
        scaled = (gate - active.of_feature(self.b_gate)).mul_(scale)
        f = (scaled + active.of_feature(self.b_mag)).relu_()
        weight = (self.control.weight / rows).to(x.dtype)
        decoded, via_gate = active.decode(f, self.W_dec), active.decode(gate, self.W_dec)
        error, error_gate = decoded.x + self.b_dec - x, via_gate.x + self.b_dec - x
        grad = error * (2 / rows)
        by_f = decoded.dot(grad).mul_(f > 0)
        by_gate = via_gate.dot(error_gate * (2 / rows)).add_(weight)
        self.b_mag.grad = active.by_feature(by_f)
        self.r_mag.grad = active.by_feature(scaled.mul_(by_f))
        self.b_gate.grad = active.by_feature(by_gate)
        self.fill_gradients(active, f, by_gate.add_(by_f.mul_(scale)), grad, z)
        squared_error, aux = error.square().sum() / rows, error_gate.square().sum() / rows
        sparsity = active.total(gate) * weight
        total = squared_error + sparsity + aux
        return Loss(total, squared_error, f, sparsity=sparsity, aux=aux, fired=active.fired(f))
