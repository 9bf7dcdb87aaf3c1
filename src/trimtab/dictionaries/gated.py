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
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.l0_control import Penalised, PenalisedConfig
from trimtab.dictionaries.sae import SAE, columns
from trimtab.dictionaries.trainable import StepLoss, batch_variance


class Gated(SAE):
    """Gated SAE for inference: f = [p + b_gate > 0] · ReLU(p · exp(r_mag) + b_mag) with p = (x − b_dec) W_enc.

    Args:
        W_enc: the encoder that both paths share.
        b_gate: bias of the gate.
        b_mag, r_mag: bias and log scale of the magnitude.
        W_dec, b_dec: decoder.
        apply_b_dec_to_input: whether the encoder sees x − b_dec (True) or x.
        info: where it comes from.
    """

    architecture = "gated"
    shapes: ClassVar = {"W_enc": "d n", "b_gate": "n", "b_mag": "n", "r_mag": "n", "W_dec": "n d", "b_dec": "d"}
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def __init__(
        self,
        W_enc: Float[Tensor, "d n"],
        b_gate: Float[Tensor, " n"],
        b_mag: Float[Tensor, " n"],
        r_mag: Float[Tensor, " n"],
        W_dec: Float[Tensor, "n d"],
        b_dec: Float[Tensor, " d"],
        *,
        apply_b_dec_to_input: bool = True,
        info: DictionaryInfo | None = None,
    ) -> None:
        weights = {"W_enc": W_enc, "b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag, "W_dec": W_dec, "b_dec": b_dec}
        info = info or DictionaryInfo(architecture=self.architecture)
        super().__init__(weights, apply_b_dec_to_input=apply_b_dec_to_input, info=info)

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        return self._encode(x, None)

    def encode_features(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"]) -> Float[Tensor, "... m"]:
        return self._encode(x, ids)

    def _encode(self, x: Tensor, ids: Tensor | None) -> Tensor:
        p = self.encoder_input(x) @ columns(self.W_enc, ids)
        magnitude = (p * columns(self.r_mag, ids).exp() + columns(self.b_mag, ids)).relu()
        return torch.where(p + columns(self.b_gate, ids) > 0, magnitude, 0.0)


@dataclass(frozen=True, kw_only=True)
class GatedConfig(PenalisedConfig):
    """Training of a Gated SAE.

    Nothing revives dead features (the paper resamples them); what keeps them alive is that the penalty rises slowly
    (`sparsity_warmup_share`) and that an L0 target is approached from above.
    """


class TrainableGated(Penalised):
    """Gated SAE in training.

    The auxiliary reconstruction reaches W_enc and b_gate and, where the encoder sees x − b_dec, b_dec through the
    encoder's input, as the paper's own reference code has it; it never reaches W_dec, b_mag or r_mag.
    """

    architecture = "gated"
    config_class = GatedConfig
    vectors = ("b_gate", "b_mag", "r_mag")
    opening = "b_gate"
    config: GatedConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def first_codes(self, h: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return torch.where(h > 0, h - self.b_gate, 0.0)

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "B d"]) -> StepLoss:
        z, rows = self.encoder_input(x), len(x)
        active = active_above(self.encoder(self.b_gate), z, 0.0, dense_above=self.dense_above)
        gate = active.h
        scale = active.of_feature(self.r_mag.exp())
        scaled = (gate - active.of_feature(self.b_gate)).mul_(scale)
        f = (scaled + active.of_feature(self.b_mag)).relu_()
        weight = self.control.weight
        decoded, via_gate = active.decode(f, self.W_dec), active.decode(gate, self.W_dec)
        error, error_gate = decoded.x + self.b_dec - x, via_gate.x + self.b_dec - x
        grad = error * (2 / rows)
        by_f = decoded.dot(grad).mul_(f > 0)
        by_gate = via_gate.dot(error_gate * (2 / rows)).add_(weight / rows)
        self.W_dec.grad = active.collect(f, grad)
        self.b_mag.grad = active.by_feature(by_f)
        self.r_mag.grad = active.by_feature(scaled.mul_(by_f))
        self.b_gate.grad = active.by_feature(by_gate)
        by_product = by_gate.add_(by_f.mul_(scale))
        self.W_enc_rows.grad = active.collect(by_product, z)
        self.b_dec.grad = grad.sum(0)
        if self.config.apply_b_dec_to_input:
            self.b_dec.grad -= active.by_feature(by_product) @ self.W_enc_rows
        l0 = active.count(f) / rows
        self.control.update(l0)
        n_dead = int(self.dead_features().sum())
        self.count_fired(active.fired(f), rows)
        squared_error, aux = error.square().sum() / rows, error_gate.square().sum() / rows
        sparsity = active.total(gate) * (weight / rows)
        return StepLoss(
            loss=squared_error + sparsity + aux,
            squared_error=squared_error,
            variance=batch_variance(x),
            sparsity=sparsity,
            aux=aux,
            l0=l0,
            n_dead=n_dead,
        )

    def export(self, info: DictionaryInfo) -> Gated:
        return Gated(
            **self.inference_weights(),
            apply_b_dec_to_input=self.config.apply_b_dec_to_input,
            info=self.named_info(info, Gated.architecture),
        )
