"""Delta Token Confidence to first order: what amplifying a feature promises by the gradient alone.

With C_k(p) = −(1/k) Σ_{j in the k most likely} log p_j, x the activation at the prefix's last token and c_i the dose of
feature i in model units, the score is c_i · ⟨∂C_k/∂x, v̂_i⟩, in nats (attribution patching: Nanda 2023; Syed et al.
2023, arXiv 2310.10348). It is the first term of ΔC_k at the same dose and, as ΔC_k, positive where the model becomes
less sure. One forward and one backward pass per prefix serve all features. It sees no curvature, and not that another
token takes the lead; `delta-confidence` beside it says how far it is right at a dose. Where two tokens share the k-th
place, C_k has a kink, and the gradient is that of one side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.lm.logit_lens import check_token_count
from trimtab.selection.criterion import GradientCriterion, Quantity, ScoringTarget
from trimtab.selection.delta_confidence import check_k


@dataclass(frozen=True, kw_only=True)
class GradientAttribution(GradientCriterion):
    """First-order ΔC_k of the next-token distribution, in nats."""

    name: ClassVar[str] = "gradient-attribution"
    signed: ClassVar[bool] = True

    k: int = 1
    """Tokens over which confidence is averaged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self.k)

    def quantity(self, target: ScoringTarget) -> Quantity:
        check_token_count(self.k, target.model.vocab_size)
        return lambda log_probs: -log_probs.topk(self.k).values.mean()
