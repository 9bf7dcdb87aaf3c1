"""CorrSteer's choice (Cho et al. 2025, arXiv 2508.12535): the feature whose activation goes with being right.

Activations are read where the answer is decided (the last prompt token and the answer's tokens but the last) while the
model is unsteered, and the largest of an answer counts. The feature with the highest Pearson correlation with
correctness is steered at every decision; its coefficient is the mean of that activation over right answers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.control.answers import ItemSet
from trimtab.control.arm import Arm, ArmKind, Choosing, register
from trimtab.errors import UserError
from trimtab.lm import Decoded, TokenBatch, capture
from trimtab.steering import StaticSource


@dataclass(frozen=True, kw_only=True)
class CorrSteerChoice:
    """A feature and its coefficient."""

    feature: int
    correlation: float
    coefficient: float
    """Mean activation on right answers (weighted by rewards above 0) times ‖W_dec‖: a length in model units."""
    items: int
    right: int


class Correlations:
    """Pearson's correlation of n features with one number, from sums over rows."""

    def __init__(self, n: int) -> None:
        self._sums = {name: torch.zeros(n, dtype=torch.float64) for name in ("f", "ff", "fy")}

    def see(self, f: Float[Tensor, "R n"], y: Float[Tensor, " R"]) -> None:
        """Take in some rows, in float64."""
        self._sums["f"] += f.sum(0)
        self._sums["ff"] += f.square().sum(0)
        self._sums["fy"] += (f * y[:, None]).sum(0)

    def values(self, y: Float[Tensor, " N"]) -> Float[Tensor, " n"]:
        """The correlations, given the numbers of all rows; −∞ for features that never vary."""
        sums, count, total = self._sums, len(y), y.sum()
        covariance = sums["fy"] - sums["f"] * total / count
        spread = (sums["ff"] - sums["f"].square() / count).clamp_min(0) * (y.square().sum() - total.square() / count)
        # A feature that never varies has no correlation; rounding must not give it one.
        varies = sums["ff"] - sums["f"].square() / count > 1e-9 * sums["ff"].clamp_min(1e-30)
        return torch.where(varies, covariance / spread.clamp_min(1e-30).sqrt(), -torch.inf)


def corrsteer(train: ItemSet) -> CorrSteerChoice:
    """Choose by correlation over training items, in one pass that stores sums only.

    Raises:
        UserError: all answers are right, or all wrong, so that nothing correlates with correctness.
    """
    dictionary, answers = train.setting.needed_dictionary(), train.answer()
    assert answers.decoded is not None
    right = torch.tensor(
        [o.reward if o.correct is None else float(o.correct) for o in answers.outcomes], dtype=torch.float64
    )
    if bool((right == right[0]).all()):
        raise UserError(
            "CorrSteer's choice", f"all {len(right)} training answers are worth the same", "leave out corrsteer"
        )
    if not bool((right > 0).any()):
        raise UserError("CorrSteer's choice", "no training answer has a reward above 0", "leave out corrsteer")
    sums, good = Correlations(dictionary.n_features), torch.zeros(dictionary.n_features, dtype=torch.float64)
    size = min(64, train.setting.batch_size)
    for start in range(0, len(right), size):
        rows = list(range(len(right)))[start : start + size]
        pooled = _largest_activations(train, answers.decoded, rows).double().cpu()
        sums.see(pooled, right[rows])
        good += (pooled * right[rows][:, None].clamp_min(0)).sum(0)
    correlation = sums.values(right)
    best = int(correlation.argmax())
    norm = float(dictionary.decoder_norms[best])
    return CorrSteerChoice(
        feature=best,
        correlation=float(correlation[best]),
        coefficient=float(good[best] / right.clamp_min(0).sum()) * norm,
        items=len(right),
        right=int((right > 0).sum()),
    )


def _largest_activations(items: ItemSet, decoded: Decoded, rows: list[int]) -> Tensor:
    """Each feature's largest activation over the decisions of each row, [rows, n]."""
    model, site, dictionary = items.setting.model, items.setting.needed_site(), items.setting.needed_dictionary()
    inputs = [decoded.prompts[row] + decoded.token_ids[row][:-1] for row in rows]
    x = capture(model, TokenBatch.pad(inputs, model.pad_id, model.device), [site])[site].flatten(2)
    pooled = []
    for place, row in enumerate(rows):
        read = x[place, -len(decoded.token_ids[row]) :]
        pooled.append(dictionary.in_model_units(dictionary.encode(read), read).max(0).values)
    return torch.stack(pooled).detach()


@register
class CorrSteer(ArmKind):
    """CorrSteer's feature, at its own coefficient and at the reference's decisions and doses."""

    name: ClassVar[str] = "corrsteer"

    def effort(self, choosing: Choosing) -> dict[str, int]:
        return {"CorrSteer's feature": len(choosing.train)}

    def arms(self, choosing: Choosing) -> list[Arm]:
        choice = corrsteer(choosing.train)

        def source(items: ItemSet, draw: int) -> StaticSource:
            return items.setting.static_source(choice.feature, choice.coefficient, "absolute")

        return self.steered(source, asdict(choice))
