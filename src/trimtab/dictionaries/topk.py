"""The TopK SAE: a row keeps its k largest pre-activations, then ReLU (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.dictionaries.active import in_full_precision
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.sae import SAE
from trimtab.dictionaries.screening import largest_screened, screening_pays
from trimtab.dictionaries.sparse import ActivePairs, SparseCodes, decode_pairs, largest
from trimtab.dictionaries.topk_training import TopKLike, TopKLikeConfig
from trimtab.errors import UserError


class TopK(SAE):
    """TopK SAE for inference: the k largest of z = (x − b_dec) W_enc + b_enc, negative ones set to 0.

    Args:
        W_enc, b_enc: encoder.
        W_dec, b_dec: decoder.
        k: features that a row keeps.
        apply_b_dec_to_input: whether the encoder sees x − b_dec (True) or x.
        rescale_acts_by_decoder_norm: choose by z·‖W_dec[i]‖, and use it as the code of the unit direction.
        info: where it comes from.

    Raises:
        UserError: a weight's shape does not fit, or k is not between 1 and the number of features.
    """

    architecture = "topk"
    shapes: ClassVar[Mapping[str, str]] = {"W_enc": "d n", "b_enc": "n", "W_dec": "n d", "b_dec": "d"}

    b_enc: nn.Parameter

    def __init__(
        self,
        W_enc: Float[Tensor, "d n"],
        b_enc: Float[Tensor, " n"],
        W_dec: Float[Tensor, "n d"],
        b_dec: Float[Tensor, " d"],
        k: int,
        *,
        apply_b_dec_to_input: bool = True,
        rescale_acts_by_decoder_norm: bool = False,
        info: DictionaryInfo | None = None,
    ) -> None:
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        info = info or DictionaryInfo(architecture=self.architecture)
        super().__init__(weights, apply_b_dec_to_input=apply_b_dec_to_input, info=info)
        if not 1 <= k <= self.n_features:
            raise UserError(f"k {k}", f"the dictionary has {self.n_features} features", "choose a k from 1 to that")
        self.k, self.rescale_acts_by_decoder_norm = k, rescale_acts_by_decoder_norm

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm,
            **super().settings,
        }

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        flat = x.reshape(-1, self.d_in)
        return self.encode_sparse(flat).dense(self.n_features).reshape(*x.shape[:-1], self.n_features)

    def decode(self, f: Float[Tensor, "... n"]) -> Float[Tensor, "... d"]:
        return super().decode(f / self._divisor() if self.rescale_acts_by_decoder_norm else f)

    def encode_sparse(self, x: Float[Tensor, "B d"]) -> SparseCodes:
        """The k codes of every row."""
        h = torch.addmm(self.b_enc, self.encoder_input(x), self.W_enc)
        if self.rescale_acts_by_decoder_norm:
            h = h * self.decoder_norms
        codes = largest(h, self.k)
        return codes._replace(values=codes.values.relu())

    def decode_sparse(self, codes: SparseCodes) -> Float[Tensor, "B d"]:
        """The reconstruction of sparse codes."""
        pairs = codes.pairs()
        if self.rescale_acts_by_decoder_norm:
            pairs = pairs._replace(value=pairs.value / self._divisor()[pairs.feature])
        return decode_pairs(pairs, self.W_dec) + self.b_dec

    def _divisor(self) -> Float[Tensor, " n"]:
        return self.decoder_norms.clamp_min(torch.finfo(self.W_dec.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class TopKConfig(TopKLikeConfig):
    """Training of a TopK SAE."""


class TrainableTopK(TopKLike):
    """TopK in training: every row keeps its k largest pre-activations."""

    architecture = "topk"
    config_class = TopKConfig

    def active_pairs(self, z: Float[Tensor, "B d"]) -> ActivePairs:
        encoder = self.encoder()
        if encoder.exact and screening_pays(encoder.W, self.k):
            pairs = largest_screened(encoder.W, encoder.b, z, self.k, block_rows=encoder.block_rows).pairs()
        else:
            blocks = [largest(h, self.k) for h in encoder.blocks(z)]
            values, indices = (torch.cat(parts) for parts in zip(*blocks, strict=True))
            pairs = in_full_precision(SparseCodes(values, indices).pairs(), encoder, z)
        return pairs._replace(value=pairs.value.relu_())

    def export(self, info: DictionaryInfo) -> TopK:
        weights: dict[str, Any] = self.inference_weights()
        return TopK(
            **weights,
            k=self.config.k,
            apply_b_dec_to_input=self.config.apply_b_dec_to_input,
            info=self.named_info(info, TopK.architecture),
        )
