"""A trained SAE in numbers, and what to say beside them: whether it reached its L0, and what to change if not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimtab.stats import number_text

L0_TOLERANCE = 0.1
"""Largest relative distance between the reached L0 and its target that counts as reaching it."""
NOTHING_LEFT = 0.99
"""Share of dead features from which nothing is left of an SAE."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A trained SAE, and what it does on rows it was not trained on."""

    sae: Path
    """Directory of the saved dictionary."""
    fingerprint: str
    """Of its weights in memory."""
    steps: int
    rows: int
    """Rows trained on, repetitions included."""
    explained_variance: float
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² on the measured rows."""
    l0: float
    """Features that fire on a measured row, on average."""
    l0_target: float | None
    """What was asked for; None where a fixed weight decided."""
    l0_reached_target: bool | None
    """Whether `l0` is within a tenth of `l0_target`; None without one."""
    sparsity_weight: float | None
    """Weight of the sparsity penalty at the end; None without a penalty."""
    dead_share: float
    """Share of features that fire on none of the measured rows."""
    dense_share: float
    """Share of features that fire on more than a tenth of them."""
    measured_rows: int
    heldout: bool
    """Whether the measured rows were held out; else they are training rows."""
    input_scale: float
    """What rows were multiplied by in training; folded into the saved weights."""
    seconds: float
    """Time that the steps of this call took."""

    @property
    def variance_text(self) -> str:
        """The explained variance in a few characters, however far below 0 it is."""
        return number_text(self.explained_variance, ".3g" if self.explained_variance <= -10 else ".4f")

    @property
    def advice(self) -> str:
        """What went wrong and what to change; empty if nothing did."""
        target, weight = self.l0_target, self.sparsity_weight
        if self.dead_share >= NOTHING_LEFT or self.explained_variance < 0:
            fix = "--sparsity-weight or --lr" if target is None and weight else "--lr"
            return (
                f"explained variance {self.variance_text}, {self.dead_share:.0%} of the features dead: "
                f"training diverged or nothing is left; lower {fix}"
            )
        if target is None or reached(self.l0, target):
            return ""
        fix = ", or raise --l0" if self.l0 > target else ", or lower --l0: so many features do not fire"
        if weight is not None:
            side = "above" if self.l0 > target else "below"
            fix = f", or fix --sparsity-weight {side} {weight:.3g}, where it ended" if weight else ""
        return f"L0 {self.l0:.2f} was reached, not the {target:g} asked for; train on more rows (--rows){fix}"


def reached(l0: float, target: float | None) -> bool | None:
    """Whether an L0 is near enough to its target; None without one."""
    return None if target is None else abs(l0 - target) <= L0_TOLERANCE * target
