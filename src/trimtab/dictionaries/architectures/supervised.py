"""Supervised codes as a dictionary (Makelov, Lange and Nanda 2024): a feature is a value of a known attribute.

x̂ = b_dec + Σ_g u_v(g): of every factor g (an attribute, or several together) one value v, which has the code u_v. A
dictionary is given no labels, so that it reads the values: x has the value of the largest linear score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.dictionaries.config_fields import Fields
from trimtab.dictionaries.sae import SAE, columns
from trimtab.dictionaries.sparse import SparseCodes
from trimtab.errors import UserError


class Supervised(SAE):
    """Codes of known values, which are read from x, not told: in each factor the value with the largest score
    (x − b_dec) W_enc + b_enc fires, with the length of its code.

    A value that is misread is rebuilt with the code of another. A code of length 0 never fires.

    Args:
        by_place, others: as for every `SAE`; `size` is the length of each code, whose direction is in `W_dec`.
        factors: number of values of each factor; features are these values, one factor after the other.

    Raises:
        UserError: a weight's shape does not fit, or the factors do not have as many values as there are features.
    """

    architecture = "supervised"
    shapes: ClassVar[Mapping[str, str]] = {"W_enc": "d n", "b_enc": "n", "W_dec": "n d", "b_dec": "d", "size": "n"}
    in_code_units = ("b_enc", "size")  # a score's bias is in no unit, but scaling all scores changes nothing
    folds_norms = False

    b_enc: nn.Parameter
    size: nn.Parameter

    def __init__(self, *by_place: Tensor, factors: Sequence[int], **others: Any) -> None:
        super().__init__(*by_place, **others)
        self.factors = list(factors)
        if sum(self.factors) != self.n_features or min(self.factors, default=0) < 1:
            raise UserError(
                f"factors of {', '.join(map(str, self.factors))} values",
                f"the dictionary has {self.n_features} features",
                "give one feature for each value",
            )

    @classmethod
    def read_settings(cls, field: Fields, n: int) -> dict[str, Any]:
        factors = field.cfg.get("factors")
        if not isinstance(factors, list) or not all(type(count) is int and count > 0 for count in factors):
            raise field.error("factors", "it must be a list of how many values each factor has")
        if sum(factors) != n:
            raise field.error("factors", f"there are {n} features")
        return {**super().read_settings(field, n), "factors": factors}

    @property
    def settings(self) -> dict[str, Any]:
        return {"factors": self.factors, **super().settings}

    def read(self, x: Float[Tensor, "... d"]) -> Int[Tensor, "... F"]:
        """The feature of each factor whose value x has by the largest score; the first of equal ones."""
        scores = self.encoder_input(x) @ self.W_enc + self.b_enc
        found, start = [], 0
        for part in scores.split(self.factors, dim=-1):
            found.append(part.argmax(-1) + start)
            start += part.shape[-1]
        return torch.stack(found, -1)

    def codes(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"] | None) -> Float[Tensor, "... m"]:
        f = self.encode_sparse(x.reshape(-1, self.d_in)).dense(self.n_features)
        return columns(f.reshape(*x.shape[:-1], self.n_features), ids)

    def encode_sparse(self, x: Float[Tensor, "B d"]) -> SparseCodes:
        """The code of one value of each factor."""
        features = self.read(x)
        return SparseCodes(self.size[features], features)
