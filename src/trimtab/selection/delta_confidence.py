"""Delta Token Confidence (arXiv 2510.03659): how much amplifying a feature changes how sure the model is.

With C_k(p) = −(1/k) Σ_{j in the k most likely} log p_j, the score is ΔC_k = C_k(p amplified) − C_k(p base), in nats,
for the next token after a neutral prefix. As the paper writes it, a *larger* C is a *less* likely top token: features
at the top of the ranking (UP) flatten the distribution, those at the bottom (DOWN) sharpen it. Both ends steer.

The paper's wording of the intervention is not consistent with itself; adding α times the largest activation at the last
token, as the output score does, is this project's reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.logit_lens import check_token_count
from trimtab.selection.criterion import EffectCriterion, ScoringTarget
from trimtab.selection.edited_distributions import EditedDistributions, Reducer


@dataclass(frozen=True, kw_only=True)
class DeltaConfidence(EffectCriterion):
    """ΔC_k of the next-token distribution, in nats."""

    name: ClassVar[str] = "delta-confidence"
    signed: ClassVar[bool] = True

    k: int = 1
    """Tokens over which confidence is averaged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self.k)

    def reducer(self, target: ScoringTarget) -> Reducer:
        check_token_count(self.k, target.model.vocab_size)

        def delta(block: EditedDistributions) -> Float[Tensor, " R"]:
            base = block.base.log_probs.topk(self.k).values.mean()
            return base - block.mean_top_log_prob(self.k)

        return delta


def check_k(k: int) -> None:
    """Raise a `UserError` unless confidence can be averaged over k tokens."""
    if k < 1:
        raise UserError(f"k {k}", "confidence is averaged over at least 1 token", "raise it")
