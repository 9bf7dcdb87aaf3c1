"""How far amplifying a feature moves the next-token distribution at all.

KL(steered ‖ base) by default: how surprising, to the model as it was, is what it now says. It weighs the tokens that
the amplified feature brings, which is what steering is about; `base-steered` weighs the tokens that it takes away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from trimtab.errors import UserError
from trimtab.selection.criterion import EffectCriterion, ScoringTarget
from trimtab.selection.edited_distributions import Reducer

KLDirection = Literal["steered-base", "base-steered"]


@dataclass(frozen=True, kw_only=True)
class KLDivergence(EffectCriterion):
    """Kullback-Leibler divergence between the amplified and the base distribution, in nats."""

    name: ClassVar[str] = "kl"

    kl_direction: KLDirection = "steered-base"
    """KL(steered ‖ base) or KL(base ‖ steered)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_direction not in get_args(KLDirection):
            raise UserError(
                f"KL direction {self.kl_direction!r}", f"allowed are {', '.join(get_args(KLDirection))}", "choose one"
            )

    def reducer(self, target: ScoringTarget) -> Reducer:
        return lambda block: block.kl(self.kl_direction)
