"""The Matryoshka BatchTopK SAE: nested dictionaries, each of which must reconstruct by itself (arXiv 2503.17547).

Features are divided into groups. The first group alone, the first two, and so on to all of them, each give a
reconstruction x̂_p, and the loss is Σ_p ‖x − x̂_p‖² (mean over rows), as in the paper. Early groups thereby keep general
features that later ones would otherwise split or absorb. Active features are BatchTopK's, chosen among all groups at
once; AuxK reconstructs the residual of the full reconstruction. Saved as JumpReLU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries.active import Active, DensePairs, SparsePairs
from trimtab.dictionaries.architectures.batchtopk import BatchTopKConfig, TrainableBatchTopK
from trimtab.dictionaries.topk_like import ErrorGradient
from trimtab.dictionaries.trainable import Loss
from trimtab.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig(BatchTopKConfig):
    """Training of a Matryoshka BatchTopK SAE."""

    groups: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    """Shares of the features in each group, summing to 1; the first group is the innermost dictionary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(sum(self.groups) - 1) >= 1e-6:
            raise UserError(f"groups {self.groups}", f"the shares sum to {sum(self.groups):g}, not to 1", "fix them")
        if min(self.group_sizes()) < 1:
            why = f"they leave a group of {self.n_features} features empty"
            raise UserError(f"groups {self.groups}", why, "use fewer groups")

    def group_sizes(self) -> tuple[int, ...]:
        """Features of each group."""
        ends = [round(sum(self.groups[: i + 1]) * self.n_features) for i in range(len(self.groups))]
        return tuple(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True))


class TrainableMatryoshka(TrainableBatchTopK):
    """Matryoshka BatchTopK in training."""

    architecture = "matryoshka"
    config_class = MatryoshkaConfig
    config: MatryoshkaConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def loss(self, x: Float[Tensor, "B d"]) -> Loss:
        """Σ_p ‖x − x̂_p‖² + α·AuxK, in which x̂_p decodes the first p groups of BatchTopK's codes."""
        h = self.pre_activations(x)
        f = self.kept(h)
        ends = itertools.accumulate(self.config.group_sizes())
        errors = [x - (f[:, :end] @ self.W_dec[:end] + self.b_dec) for end in ends]
        squared = torch.stack([error.square().sum(1).mean() for error in errors])
        aux = self.aux_loss(h, errors[-1])
        return Loss(squared.sum() + self.config.aux_coefficient * aux, squared[-1], f, aux=aux)

    def reconstruction(self, active: Active, x: Float[Tensor, "B d"]) -> ErrorGradient:
        """The summed loss of all prefixes; every pair is decoded once. `squared_error` is the full reconstruction's."""
        rows, groups = x.shape[0], self._by_group(active)
        decoded = [group.active.decode(group.active.h, self.W_dec[group.features]) for group in groups]
        x_hat = self.b_dec.detach()
        errors = []
        for one in decoded:
            x_hat = x_hat + one.x
            errors.append(x_hat - x)
        by_value, self.W_dec.grad = torch.empty_like(active.h), torch.empty_like(self.W_dec)
        grad = torch.zeros_like(x)
        for group, one, error in zip(reversed(groups), reversed(decoded), reversed(errors), strict=True):
            grad += error * (2 / rows)  # of this prefix and of all that contain it
            by_value[group.place] = one.dot(grad)
            self.W_dec.grad[group.features] = group.active.collect(group.active.h, grad)
        squared = torch.stack([error.square().sum() / rows for error in errors])
        self.b_dec.grad = grad.sum(0)
        return ErrorGradient(squared.sum(), squared[-1], -errors[-1], by_value)

    def _by_group(self, active: Active) -> list[_Group]:
        """The pairs of each group, as if it were a dictionary by itself."""
        groups, start = [], 0
        for size in self.config.group_sizes():
            features = slice(start, start + size)
            if isinstance(active, DensePairs):
                mine = (slice(None), features)
                part = DensePairs(active.h[mine], active.mask[mine], active.precision)
            else:
                pairs = active.pairs
                mine = (pairs.feature >= start) & (pairs.feature < start + size)
                part = SparsePairs(pairs._replace(feature=pairs.feature - start).where(mine), size)
            groups.append(_Group(mine, features, part))
            start += size
        return groups


class _Group(NamedTuple):
    place: Tensor | tuple[slice, slice]
    """Which of all pairs are its own."""
    features: slice
    active: Active
