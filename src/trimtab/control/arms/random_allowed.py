"""A random feature at each decision, of those that the setting's mask allows there.

It isolates a policy's choice: a mask by itself may leave only features that matter here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.control.arm import Arm, ArmKind, Choosing, Match, register
from trimtab.control.arms.random_features import draw_seed
from trimtab.control.setting import Setting
from trimtab.lm import DecodeStart, EditRequest
from trimtab.lm.sampling import ACTION_STREAM, inverse_cdf
from trimtab.steering import Choice, DirectionSource


class AllowedRandomSource(DirectionSource):
    """Picks uniformly among the features that a setting's mask allows; where it allows none, none.

    Args:
        setting: gives dictionary, site and mask.
        seed: of the draws.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        super().__init__(setting.needed_dictionary(), setting.needed_site(), unit="relative")
        self.mask, self.seed = setting.fresh_mask(), seed

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        self.mask.start(start)
        self._first = torch.tensor([len(prompt) - 1 for prompt in start.prompts], device=start.device)

    def pick(self, request: EditRequest) -> Choice:
        row = request.row
        allowed = self.mask.allowed(request.x, row, request.position - self._first[row])
        count = allowed.sum(-1, keepdim=True)
        feature = inverse_cdf(allowed.float(), request.uniform(ACTION_STREAM, seed=self.seed))[:, None]
        return Choice(torch.where(count > 0, feature, -1), torch.ones(feature.shape, device=feature.device))


@register
@dataclass(frozen=True, kw_only=True)
class RandomAllowed(ArmKind):
    """Random features that the mask allows, at the reference's decisions and doses."""

    name: ClassVar[str] = "random-allowed"
    strengths: ClassVar[tuple[Match, ...]] = ("dose", "kl")
    draws: int = 3
    """Repetitions."""

    def arms(self, choosing: Choosing) -> list[Arm]:
        return self.steered(
            lambda items, draw: AllowedRandomSource(items.setting, draw_seed(items.setting.seed, draw)),
            {"mask": choosing.validation.setting.mask},
            own=False,
            draws=self.draws,
        )
