"""CorrSteer's choice (Cho et al. 2025, arXiv 2508.12535): the feature whose activation goes with being right.

Activations are read where the answer is decided (the last prompt token and the answer's tokens but the last) while the
model is unsteered, and the largest of an answer counts. The feature with the highest Pearson correlation with
correctness is steered at every decision; its coefficient is the mean of that activation over right answers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import TokenBatch, capture
from trimtab.policies.controls.scene import Scene
from trimtab.steering import StaticSource


@dataclass(frozen=True, kw_only=True)
class CorrSteerChoice:
    """A feature and its coefficient."""

    feature: int
    correlation: float
    coefficient: float
    """Mean activation on right answers times ‖W_dec‖: a length in model units."""
    items: int
    right: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def corrsteer(train: Scene) -> CorrSteerChoice:
    """Choose by correlation over training items, in one pass that stores sums only.

    Raises:
        UserError: all answers are right, or all wrong, so that nothing correlates with correctness.
    """
    setup = train.setup
    played = train.play()
    assert played.decoded is not None
    right = torch.tensor(
        [o.reward if o.correct is None else float(o.correct) for o in played.outcomes], dtype=torch.float64
    )
    if bool((right == right[0]).all()):
        raise UserError(
            "CorrSteer's choice", f"all {len(right)} training answers are worth the same", "leave out corrsteer"
        )
    n = setup.sae.n_features
    sums = {name: torch.zeros(n, dtype=torch.float64) for name in ("f", "ff", "fy")}
    for rows in train.batches(list(range(len(right)))):
        pooled = _largest_activations(train, played.decoded.prompts, played.decoded.token_ids, rows).double().cpu()
        y = right[rows][:, None]
        sums["f"] += pooled.sum(0)
        sums["ff"] += pooled.square().sum(0)
        sums["fy"] += (pooled * y).sum(0)
    count, total = len(right), right.sum()
    covariance = sums["fy"] - sums["f"] * total / count
    spread = (sums["ff"] - sums["f"].square() / count).clamp_min(0) * (right.square().sum() - total.square() / count)
    # A feature that never varies has no correlation; rounding must not give it one.
    varies = sums["ff"] - sums["f"].square() / count > 1e-9 * sums["ff"].clamp_min(1e-30)
    correlation = torch.where(varies, covariance / spread.clamp_min(1e-30).sqrt(), -torch.inf)
    best = int(correlation.argmax())
    norm = float(setup.sae.decoder_norms[best])
    return CorrSteerChoice(
        feature=best,
        correlation=float(correlation[best]),
        coefficient=float(sums["fy"][best] / total) * norm,
        items=count,
        right=int((right > 0).sum()),
    )


def corrsteer_source(scene: Scene, choice: CorrSteerChoice) -> StaticSource:
    """The feature at CorrSteer's own coefficient, at every decision."""
    return StaticSource(scene.setup.sae, choice.feature, choice.coefficient, scene.setup.site, unit="absolute")


def _largest_activations(scene: Scene, prompts: list[list[int]], answers: list[list[int]], rows: list[int]) -> Tensor:
    """Each feature's largest activation over the decisions of each row, [rows, n]."""
    setup = scene.setup
    inputs = [prompts[row] + answers[row][:-1] for row in rows]
    batch = TokenBatch.pad(inputs, setup.model.pad_id, setup.model.device)
    x = capture(setup.model, batch, [setup.site])[setup.site]
    pooled = []
    for place, row in enumerate(rows):
        decisions = len(answers[row])
        pooled.append(setup.sae.encode(x[place, -decisions:]).max(0).values)
    return torch.stack(pooled).detach()
