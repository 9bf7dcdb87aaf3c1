"""The JumpReLU SAE: a ReLU SAE whose feature fires only above its own threshold θ (Rajamanoharan et al. 2024b).

BatchTopK and Matryoshka SAEs are saved as this architecture, with one threshold for all features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.sae import SAE, columns


class JumpReLU(SAE):
    """JumpReLU SAE for inference: f = ReLU(z) · [z > θ] with z = (x − b_dec) W_enc + b_enc; at z = θ it is silent.

    Args:
        W_enc, b_enc: encoder.
        W_dec, b_dec: decoder.
        threshold: θ of every feature.
        apply_b_dec_to_input: whether the encoder sees x − b_dec (True) or x.
        info: where it comes from.
    """

    architecture = "jumprelu"
    shapes: ClassVar = {"W_enc": "d n", "b_enc": "n", "W_dec": "n d", "b_dec": "d", "threshold": "n"}
    b_enc: nn.Parameter
    threshold: nn.Parameter

    def __init__(
        self,
        W_enc: Float[Tensor, "d n"],
        b_enc: Float[Tensor, " n"],
        W_dec: Float[Tensor, "n d"],
        b_dec: Float[Tensor, " d"],
        threshold: Float[Tensor, " n"],
        *,
        apply_b_dec_to_input: bool = True,
        info: DictionaryInfo | None = None,
    ) -> None:
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
        info = info or DictionaryInfo(architecture=self.architecture)
        super().__init__(weights, apply_b_dec_to_input=apply_b_dec_to_input, info=info)

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        return self._encode(x, None)

    def encode_features(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"]) -> Float[Tensor, "... m"]:
        return self._encode(x, ids)

    def _encode(self, x: Tensor, ids: Tensor | None) -> Tensor:
        z = self.encoder_input(x) @ columns(self.W_enc, ids) + columns(self.b_enc, ids)
        return torch.where(z > columns(self.threshold, ids), z.relu(), 0.0)
