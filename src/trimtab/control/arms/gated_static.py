"""The static feature behind a gate: a logistic regression on the activation at the last prompt token says whether the
feature helps this item. It can do what a policy with one feature could do at its first decision.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from trimtab.control.answers import Answers, ItemSet
from trimtab.control.arm import Arm, Choosing, answers_under, register
from trimtab.control.arms.static import BestStatic, StaticChoice, static_source
from trimtab.steering import StaticSource

PENALTIES = tuple(10.0**k for k in range(-4, 2))
"""Inverse strengths of the penalty that are tried (scikit-learn's C)."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Edits where weights · (x − mean) / scale + bias > 0."""

    weights: Float[np.ndarray, " d"]
    bias: float
    mean: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]

    def score(self, x: Float[np.ndarray, "P d"]) -> Float[NDArray[np.float64], " P"]:
        """Log-odds that the feature helps."""
        return (x.astype(np.float64) - self.mean) / self.scale @ self.weights + self.bias


@dataclass(frozen=True, kw_only=True)
class GateFit:
    """A gate and what it was fitted on."""

    gate: Gate
    helped: int
    """Training items that the feature made better."""
    hurt: int
    """Training items that it made worse."""
    items: int
    penalty: float | None
    """C, chosen by validation reward; None where the training items were all of one kind."""
    reward: float
    """Mean on validation."""


def fit_gate(train: ItemSet, validation: ItemSet, choice: StaticChoice) -> GateFit:
    """Fit on the training items that the feature changes, each weighted by how much; choose C on validation."""
    x, gain, _ = _gains(train, choice)
    x_validation, gain_validation, unsteered = _gains(validation, choice)
    mean, scale = x.mean(0).astype(np.float64), x.std(0).astype(np.float64) + 1e-6
    changed = gain != 0
    helped, hurt = int((gain > 0).sum()), int((gain < 0).sum())
    gates: list[tuple[float | None, Gate]] = []
    if helped and hurt:
        z = (x[changed] - mean) / scale
        for penalty in PENALTIES:
            model = LogisticRegression(C=penalty, max_iter=1000)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(z, gain[changed] > 0, sample_weight=np.abs(gain[changed]))
            gate = Gate(weights=model.coef_[0], bias=float(np.asarray(model.intercept_)[0]), mean=mean, scale=scale)
            gates.append((penalty, gate))
    else:
        bias = 1.0 if helped else -1.0
        gates.append((None, Gate(weights=np.zeros(x.shape[1]), bias=bias, mean=mean, scale=scale)))
    earned = [float((unsteered + np.where(g.score(x_validation) > 0, gain_validation, 0)).mean()) for _, g in gates]
    best = int(np.argmax(earned))
    penalty, gate = gates[best]
    return GateFit(gate=gate, helped=helped, hurt=hurt, items=len(train), penalty=penalty, reward=earned[best])


def gated_source(items: ItemSet, choice: StaticChoice, gate: Gate) -> StaticSource:
    """The feature at its own dose, in the items that the gate opens for."""
    feature = np.where(gate.score(items.activations()) > 0, choice.feature, -1)[:, None].tolist()
    return items.setting.static_source(feature, choice.dose)


def gated_like_reference(items: ItemSet, choice: StaticChoice, gate: Gate, scale: float = 1.0) -> StaticSource:
    """The feature at the reference's mean relative dose, in as many items as that edits: those with most reason."""
    assert items.schedule is not None
    score = gate.score(items.activations())
    most = np.zeros(len(score), dtype=bool)
    most[np.argsort(-score, kind="stable")[: items.schedule.rows]] = True
    feature = np.where(most, choice.feature, -1)[:, None].tolist()
    return items.setting.static_source(feature, items.schedule.mean * scale, "relative")


def _gains(
    items: ItemSet, choice: StaticChoice
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Activations, what the feature adds to each item's reward, and the reward without it."""
    unsteered = items.answer().reward
    steered = items.answer(static_source(items, choice)).reward
    return items.activations(), steered - unsteered, unsteered


@register
@dataclass(frozen=True, kw_only=True)
class GatedStatic(BestStatic):
    """The best static feature behind a gate, by itself and in as many items as the reference edits."""

    name: ClassVar[str] = "gated"
    main: ClassVar[bool] = False

    def effort(self, choosing: Choosing) -> dict[str, int]:
        gates = 2 * (len(choosing.train) + len(choosing.validation))
        return super().effort(choosing) | {"the gate of a static feature": gates}

    def arms(self, choosing: Choosing) -> list[Arm]:
        choice = self.choice(choosing)
        fit = fit_gate(choosing.train, choosing.validation, choice)
        about = asdict(choice) | {"gate": {name: value for name, value in asdict(fit).items() if name != "gate"}}

        def by_itself(items: ItemSet, scale: float) -> list[Answers]:
            return answers_under(items, [gated_source(items, choice, fit.gate)])

        def matched(items: ItemSet, scale: float) -> list[Answers]:
            return answers_under(items, [gated_like_reference(items, choice, fit.gate, scale)])

        own = self.arm(by_itself, about)
        return [own, *(self.arm(matched, about, match=match, scheduled=True) for match in ("dose", "kl"))]
