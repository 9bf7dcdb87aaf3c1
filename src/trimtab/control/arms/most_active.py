"""The most active feature at each decision, read from the activation that is edited."""

from __future__ import annotations

from typing import ClassVar

from trimtab.control.answers import ItemSet
from trimtab.control.arm import Arm, ArmKind, Choosing, Match, register
from trimtab.steering import TopActiveSource


@register
class MostActive(ArmKind):
    """The most active feature at the reference's decisions and doses."""

    name: ClassVar[str] = "most-active"
    strengths: ClassVar[tuple[Match, ...]] = ("dose", "kl")

    def arms(self, choosing: Choosing) -> list[Arm]:
        def source(items: ItemSet, draw: int) -> TopActiveSource:
            return TopActiveSource(items.setting.needed_dictionary(), 1.0, items.setting.needed_site())

        return self.steered(source, own=False)
