"""How concentrated the logit lens of a feature is: whether its decoder row singles out a few tokens.

The measure is the kurtosis of the logits over the vocabulary, as for neurons in Gurnee et al. (2024, arXiv 2401.12181):
with l = head(final_norm(W_dec[i])) and l̄ the mean over its V tokens,

    K(i) = (1/V) Σ_v (l_v − l̄)⁴ / ((1/V) Σ_v (l_v − l̄)²)²,

3 for logits that are normally distributed, more where few tokens stand out, and V²/(V − 1) − 3, the most there is,
where it is one. Unlike the entropy of the lens's softmax it does not depend on the scale of the logits, and a row that
suppresses a few tokens is as concentrated as one that promotes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.lm.logit_lens import lens_logits
from trimtab.selection.criterion import ScoringTarget, StatisticCriterion


@dataclass(frozen=True, kw_only=True)
class LensConcentration(StatisticCriterion):
    """Kurtosis of the logits that the logit lens reads in a feature's decoder row; 1, the least there is, where they
    are all the same."""

    name: ClassVar[str] = "lens-concentration"

    @torch.no_grad()
    def scores(self, target: ScoringTarget) -> Float[Tensor, " n"]:
        return torch.cat([_kurtosis(logits).cpu() for logits in lens_logits(target.model, target.residual_rows())])


def _kurtosis(logits: Float[Tensor, "R V"]) -> Float[Tensor, " R"]:
    squares = (logits - logits.mean(-1, keepdim=True)).square_()
    variance = squares.mean(-1)
    fourth = squares.square_().mean(-1)
    return torch.where(variance > 0, fourth / variance.square(), 1.0)
