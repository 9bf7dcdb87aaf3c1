"""An architecture of one's own, all of it: a ReLU SAE with a penalty on the square roots of its codes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from trimtab.dictionaries.architectures.standard import Standard
from trimtab.dictionaries.penalised import PenalisedConfig, ReLULike
from trimtab.dictionaries.trainable import Loss
from trimtab.runs import LEFT_OUT_AT_DEFAULT


@dataclass(frozen=True, kw_only=True)
class RootReLUConfig(PenalisedConfig):
    """Training of a ReLU SAE whose penalty is λ Σ (√(f + c) − √c)."""

    root_floor: float = field(default=0.01, metadata=LEFT_OUT_AT_DEFAULT)
    """c, which keeps the slope finite at 0."""


class TrainableRootReLU(ReLULike):
    """The training, by automatic differentiation of its loss."""

    architecture = "rootrelu"
    config_class = RootReLUConfig
    inference_class = Standard
    config: RootReLUConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def loss(self, x: Tensor) -> Loss:
        f, c = self.pre_activations(x).relu(), self.config.root_floor
        squared_error = (x - self.reconstruct(f)).square().sum(1).mean()
        sparsity = self.control.weight * ((f + c).sqrt() - c**0.5).sum(1).mean()
        return Loss(squared_error + sparsity, squared_error, f, sparsity=sparsity)
