"""The TopK SAE: a row keeps its k largest pre-activations, then ReLU (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.dictionaries.active import in_full_precision
from trimtab.dictionaries.config_fields import Fields
from trimtab.dictionaries.sae import SAE, columns
from trimtab.dictionaries.screening import largest_screened, screening_pays
from trimtab.dictionaries.sparse import ActivePairs, SparseCodes, keep_largest, largest
from trimtab.dictionaries.topk_like import TopKLike, TopKLikeConfig
from trimtab.dictionaries.trainable import Loss
from trimtab.errors import UserError


class TopK(SAE):
    """TopK SAE for inference: the k largest of z = (x − b_dec) W_enc + b_enc, negative ones set to 0.

    Args:
        by_place, others: as for every `SAE`.
        k: features that a row keeps.
        rescale_acts_by_decoder_norm: choose by z·‖W_dec[i]‖, and use it as the code of the unit direction.

    Raises:
        UserError: a weight's shape does not fit, or k is not between 1 and the number of features.
    """

    architecture = "topk"
    shapes: ClassVar[Mapping[str, str]] = {"W_enc": "d n", "b_enc": "n", "W_dec": "n d", "b_dec": "d"}
    codes_alone = False

    b_enc: nn.Parameter

    def __init__(self, *by_place: Tensor, k: int, rescale_acts_by_decoder_norm: bool = False, **others: Any) -> None:
        super().__init__(*by_place, **others)
        if not 1 <= k <= self.n_features:
            raise UserError(f"k {k}", f"the dictionary has {self.n_features} features", "choose a k from 1 to that")
        self.k, self.rescale_acts_by_decoder_norm = k, rescale_acts_by_decoder_norm

    @classmethod
    def read_settings(cls, field: Fields, n: int) -> dict[str, Any]:
        k, rescale = field.positive_integer("k"), field.boolean("rescale_acts_by_decoder_norm", default=False)
        if k > n:
            raise field.error("k", f"there are {n} features")
        return {**super().read_settings(field, n), "k": k, "rescale_acts_by_decoder_norm": rescale}

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm,
            **super().settings,
        }

    def codes(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"] | None) -> Float[Tensor, "... m"]:
        flat = x.reshape(-1, self.d_in)
        f = self.encode_sparse(flat).dense(self.n_features).reshape(*x.shape[:-1], self.n_features)
        return columns(f, ids)

    def decoded(self, f: Float[Tensor, "... n"]) -> Float[Tensor, "... d"]:
        return super().decoded(f / self._divisor() if self.rescale_acts_by_decoder_norm else f)

    def encode_sparse(self, x: Float[Tensor, "B d"]) -> SparseCodes:
        """The k codes of every row."""
        h = torch.addmm(self.b_enc, self.encoder_input(x), self.W_enc)
        if self.rescale_acts_by_decoder_norm:
            h = h * self.decoder_norms
        codes = largest(h, self.k)
        return codes._replace(values=codes.values.relu())

    def decoded_sparse(self, codes: SparseCodes | Float[Tensor, "B n"]) -> Float[Tensor, "B d"]:
        if self.rescale_acts_by_decoder_norm and not isinstance(codes, Tensor):
            codes = codes._replace(values=codes.values / self._divisor()[codes.indices])
        return super().decoded_sparse(codes)

    def _divisor(self) -> Float[Tensor, " n"]:
        return self.decoder_norms.clamp_min(torch.finfo(self.W_dec.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class TopKConfig(TopKLikeConfig):
    """Training of a TopK SAE."""


class TrainableTopK(TopKLike):
    """TopK in training: every row keeps its k largest pre-activations."""

    architecture = "topk"
    config_class = TopKConfig
    inference_class = TopK

    @property
    def waits(self) -> bool:
        return super().waits and self.execution != "sparse"  # k pairs a row, wherever they are

    def loss(self, x: Float[Tensor, "B d"]) -> Loss:
        """‖x − x̂‖² + α·AuxK with f = ReLU(TopK(h)) (section 2.3, appendix A.2)."""
        h = self.pre_activations(x)
        kept = torch.zeros_like(h).scatter_(1, h.topk(self.k, dim=1).indices, 1.0)
        f = h.relu() * kept
        error = x - self.reconstruct(f)
        squared_error, aux = error.square().sum(1).mean(), self.aux_loss(h, error)
        return Loss(squared_error + self.config.aux_coefficient * aux, squared_error, f, aux=aux)

    def kept(self, h: Float[Tensor, "B n"]) -> Float[Tensor, "B n"]:
        return keep_largest(h, self.k)

    @torch.no_grad()
    def active_pairs(self, z: Float[Tensor, "B d"]) -> ActivePairs:
        encoder = self.encoder()
        if screening_pays(encoder, self.k):
            pairs = largest_screened(encoder, z, self.k).pairs()
        else:
            blocks = [largest(encoder(block), self.k) for block in z.split(encoder.block_rows)]
            values, indices = (torch.cat(parts) for parts in zip(*blocks, strict=True))
            pairs = in_full_precision(SparseCodes(values, indices).pairs(), encoder, z)
        return pairs._replace(value=pairs.value.relu_())

    def inference_settings(self) -> dict[str, Any]:
        return {**super().inference_settings(), "k": self.config.k}
