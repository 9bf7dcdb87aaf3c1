"""A random feature at each decision, of those that the policy's mask allows there.

Beside it the policy's choice stands alone: a mask by itself may leave only features that matter here.
"""

from __future__ import annotations

import torch

from trimtab.lm import DecodeStart, EditRequest
from trimtab.lm.sampling import ACTION_STREAM, inverse_cdf, uniform
from trimtab.policies.setup import Setup
from trimtab.steering import Choice, DirectionSource


class AllowedRandomSource(DirectionSource):
    """Picks uniformly among the features that a training's mask allows; where it allows none, none.

    Args:
        setup: of the training: SAE, site and mask.
        seed: of the draws.
    """

    def __init__(self, setup: Setup, seed: int) -> None:
        super().__init__(setup.sae, setup.site, unit="relative")
        self.mask, self.seed = setup.mask(), seed

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        self.mask.start(start)
        self._first = torch.tensor([len(prompt) - 1 for prompt in start.prompts], device=start.device)

    def pick(self, request: EditRequest) -> Choice:
        row, start = request.row, self.begun
        allowed = self.mask.allowed(request.x, row, request.position - self._first[row])
        count = allowed.sum(-1, keepdim=True)
        u = uniform(self.seed, start.sample[row], start.branch[row], request.position, ACTION_STREAM)
        feature = inverse_cdf(allowed.float(), u)[:, None]
        return Choice(torch.where(count > 0, feature, -1), torch.ones(feature.shape, device=feature.device))
