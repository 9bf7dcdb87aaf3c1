"""The output score (Arad et al., arXiv 2505.20063): does amplifying a feature make the tokens it stands for come out?

M_i are the `n_tokens` most likely tokens of softmax(head(final_norm(W_dec[i]))). With p the next-token distribution
while feature i is amplified at the last token of the neutral prefix, and rank 0 the most likely token,

    S_out(i) = (1 − min_{t ∈ M_i} rank(t) / |V|) · max_{t ∈ M_i} p(t).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from trimtab.selection.criterion import EffectCriterion, ScoringTarget
from trimtab.selection.edited_distributions import EditedDistributions, Reducer


@dataclass(frozen=True, kw_only=True)
class OutputScore(EffectCriterion):
    """S_out, from 0 to 1."""

    name: ClassVar[str] = "output-score"

    n_tokens: int = 20
    """Tokens that a feature is taken to stand for, by the logit lens."""

    def reducer(self, target: ScoringTarget) -> Reducer:
        own = target.lens_tokens(self.n_tokens).to(target.model.device)

        def score(block: EditedDistributions) -> Float[Tensor, " R"]:
            tokens = own[block.rows]
            log_prob, best = block.log_prob(tokens).max(-1)  # the likeliest of M has the smallest rank too
            rank = block.rank(tokens.gather(-1, best[:, None])[:, 0])
            return (1 - rank / block.logits.shape[-1]) * log_prob.exp()

        return score
