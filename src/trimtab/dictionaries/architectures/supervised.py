"""Supervised codes as a dictionary (Makelov, Lange and Nanda 2024): a feature is a value of a known attribute.

x̂ = b_dec + Σ_g u_v(g): of every factor g (an attribute, or several together) one value v, which has the code u_v. A
dictionary is given no labels, so that it reads the values: by the largest linear score of each factor, and then a few
times each factor anew from what the codes of the others leave over (iterated conditional modes, Besag 1986), since a
factor that varies much hides the others.
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

PASSES = 3
"""How often each factor is read anew."""


class Supervised(SAE):
    """Codes of known values, which are read from x, not told; the values read fire, with the lengths of their codes.

    With z = x − b_dec, the first guess is each factor's largest score z W_enc + b_enc. In every pass each factor in
    turn takes the largest (z − Σ u of the other factors' values) W_left + b_left. (This may end at values that are
    likelier than those that differ in one factor, but not the likeliest of all.)

    A value that is misread is rebuilt with the code of another. A code of length 0 never fires.

    Args:
        by_place, others: as for every `SAE`; `size` is the length of each code, whose direction is in `W_dec`.
        factors: number of values of each factor; features are these values, one factor after the other.
        passes: how often each factor is read anew.

    Raises:
        UserError: a weight's shape does not fit, or the factors do not have as many values as there are features.
    """

    architecture = "supervised"
    shapes: ClassVar[Mapping[str, str]] = {
        "W_enc": "d n", "b_enc": "n", "W_dec": "n d", "b_dec": "d", "size": "n", "W_left": "d n", "b_left": "n",
    }  # fmt: skip
    in_code_units = ("b_enc", "b_left", "size")  # scores are in no unit, but scaling all of them changes nothing
    folds_norms = False
    codes_alone = False

    b_enc: nn.Parameter
    size: nn.Parameter
    W_left: nn.Parameter
    b_left: nn.Parameter

    def __init__(self, *by_place: Tensor, factors: Sequence[int], passes: int = PASSES, **others: Any) -> None:
        super().__init__(*by_place, **others)
        self.factors, self.passes = list(factors), passes
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
        return {**super().read_settings(field, n), "factors": factors, "passes": field.positive_integer("passes")}

    @property
    def settings(self) -> dict[str, Any]:
        return {"factors": self.factors, "passes": self.passes, **super().settings}

    def read(self, x: Float[Tensor, "... d"]) -> Int[Tensor, "... F"]:
        """The feature of each factor whose value x is read to have; the first of equal ones."""
        z = self.encoder_input(x)
        ends = torch.tensor(self.factors).cumsum(0).tolist()
        parts = [slice(end - count, end) for end, count in zip(ends, self.factors, strict=True)]
        first, left = z @ self.W_enc + self.b_enc, z @ self.W_left + self.b_left
        found = torch.stack([first[..., part].argmax(-1) + part.start for part in parts], -1)
        taken = (self.size[:, None] * self.W_dec) @ self.W_left  # [n, n] what a value takes from the scores of others
        for factor, part in [*enumerate(parts)] * (self.passes if len(parts) > 1 else 0):
            others = [other for other in range(len(parts)) if other != factor]
            scores = left[..., part] - sum(taken[:, part][found[..., other]] for other in others)
            found[..., factor] = scores.argmax(-1) + part.start
        return found

    def codes(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"] | None) -> Float[Tensor, "... m"]:
        f = self.encode_sparse(x.reshape(-1, self.d_in)).dense(self.n_features)
        return columns(f.reshape(*x.shape[:-1], self.n_features), ids)

    def encode_sparse(self, x: Float[Tensor, "B d"]) -> SparseCodes:
        """The code of one value of each factor."""
        features = self.read(x)
        return SparseCodes(self.size[features], features)
