"""A random live feature at each decision: what any feature does there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.control.answers import ItemSet
from trimtab.control.arm import Arm, ArmKind, Choosing, Match, register
from trimtab.steering import RandomFeatureSource


@register
@dataclass(frozen=True, kw_only=True)
class RandomFeatures(ArmKind):
    """Random live features at the reference's decisions and doses."""

    name: ClassVar[str] = "random"
    strengths: ClassVar[tuple[Match, ...]] = ("dose", "kl")
    main: ClassVar[bool] = True
    draws: int = 3
    """Repetitions."""

    def arms(self, choosing: Choosing) -> list[Arm]:
        def source(items: ItemSet, draw: int) -> RandomFeatureSource:
            setting, seed = items.setting, draw_seed(items.setting.seed, draw)
            return RandomFeatureSource(setting.needed_dictionary(), 1.0, setting.needed_site(), seed=seed)

        return self.steered(source, own=False, draws=self.draws)


def draw_seed(seed: int, draw: int) -> int:
    """The seed of one of several draws in a setting."""
    return seed * 1000 + draw
