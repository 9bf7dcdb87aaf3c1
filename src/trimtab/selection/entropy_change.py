"""How much more or less certain of the next token the model is while a feature is amplified, over the whole vocabulary.

Where ΔC_k looks at the k most likely tokens, this looks at all of them: H(steered) − H(base), H(p) = −Σ_v p_v log p_v.
Features at the top of the ranking flatten the distribution, those at the bottom sharpen it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.selection.criterion import EffectCriterion, ScoringTarget
from trimtab.selection.edited_distributions import Reducer


@dataclass(frozen=True, kw_only=True)
class EntropyChange(EffectCriterion):
    """Entropy of the amplified next-token distribution minus that of the base one, in nats."""

    name: ClassVar[str] = "entropy-change"
    signed: ClassVar[bool] = True

    def reducer(self, target: ScoringTarget) -> Reducer:
        return lambda block: block.entropy - block.base.entropy
