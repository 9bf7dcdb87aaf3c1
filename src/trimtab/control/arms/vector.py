"""A learned vector: one direction for all items, added at a fixed relative dose. What one free static edit can do."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.control.answers import ItemSet
from trimtab.control.arm import Arm, ArmKind, Choosing, register
from trimtab.control.learning import Learnable, Learned, answers_to_learn, learn
from trimtab.errors import UserError
from trimtab.lm import RowDelta, edited
from trimtab.lm.taps import site_width
from trimtab.steering import VectorSource


class LearnedVector(Learnable):
    """A vector whose direction alone counts.

    Args:
        d: width of the site.
        dose: ‖Δ‖/‖x‖ of the edit.
        seed: of the initial direction.
    """

    def __init__(self, d: int, dose: float, *, seed: int = 0) -> None:
        super().__init__()
        vector = torch.randn(d, generator=torch.Generator().manual_seed(seed))
        self.vector = nn.Parameter(vector / vector.norm())
        self.dose = dose

    def source(self, items: ItemSet) -> VectorSource:
        """The vector at its dose, at every decision."""
        return VectorSource(self.vector.detach().clone(), items.setting.needed_site(), self.dose, unit="relative")

    def applied(self, items: ItemSet) -> AbstractContextManager[Any]:
        def add(x: Tensor) -> RowDelta:
            return add_everywhere(x, self.vector, self.dose)

        return edited(items.setting.model, {items.setting.needed_site(): add})

    def changes(self, items: ItemSet) -> dict[str, Any]:
        return {"source": self.source(items)}


def add_everywhere(x: Float[Tensor, "B T d"], vector: Float[Tensor, " d"], dose: float) -> RowDelta:
    """A vector's direction at a relative dose at every place; gradients reach the vector."""
    rows, times = x.shape[:2]
    direction = vector.to(x.device) / vector.norm()
    length = dose * x.float().norm(dim=-1, keepdim=True)
    batch = torch.arange(rows, device=x.device).repeat_interleave(times)
    time = torch.arange(times, device=x.device).repeat(rows)
    return RowDelta(batch, time, (length * direction).flatten(0, 1))


def learn_vector(
    train: ItemSet, validation: ItemSet, dose: float, *, seed: int = 0, **options: int
) -> tuple[LearnedVector, Learned]:
    """Train a vector of a relative dose on the training items; `options` are further arguments of `learn`.

    Adam moves each coordinate by a quarter of the unit vector's mean coordinate per step at first, so that a few dozen
    steps can turn the vector to anywhere.
    """
    d = site_width(train.setting.model, train.setting.needed_site())
    vector = LearnedVector(d, dose, seed=seed).to(train.setting.model.device)
    return vector, learn(vector, train, validation, lr=0.25 / d**0.5, seed=seed, **options)


@register
@dataclass(frozen=True, kw_only=True)
class Vector(ArmKind):
    """A vector trained at the reference's mean relative dose, or at the setting's where nothing is a reference."""

    name: ClassVar[str] = "vector"
    main: ClassVar[bool] = True
    per_training: ClassVar[bool] = True
    steps: int = 100
    """Steps of training."""
    batch: int = 16
    """Items of a step."""

    def effort(self, choosing: Choosing) -> dict[str, int]:
        return {"a vector": answers_to_learn(choosing.train, choosing.validation, steps=self.steps, batch=self.batch)}

    def arms(self, choosing: Choosing) -> list[Arm]:
        train, validation = choosing.train, choosing.validation
        if validation.schedule is None and train.setting.unit != "relative":
            raise UserError(
                "a learned vector", f"the setting's dose is {train.setting.unit}", "give the setting a relative dose"
            )
        dose = train.setting.dose if validation.schedule is None else validation.schedule.mean
        if not dose:
            return []  # the reference edits nothing, which is said once for all arms
        vector, learned = learn_vector(
            train, validation, dose, steps=self.steps, batch=self.batch, seed=train.setting.seed
        )  # fmt: skip
        about = asdict(learned) | {"relative_dose": dose}
        return self.steered(lambda items, draw: vector.source(items), about)
