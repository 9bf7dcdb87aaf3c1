"""The Gated SAE: one path decides whether a feature fires, the other how strongly (Rajamanoharan et al. 2024a).

Both share W_enc; the magnitude path scales it per feature by exp(r_mag), as in the paper's tied parametrisation.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.sae import SAE, columns


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
