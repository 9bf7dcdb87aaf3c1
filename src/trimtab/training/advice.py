"""What to say about a trained SAE beside its numbers: whether it reached its L0, and what to change if not."""

from __future__ import annotations

from typing import Any

from trimtab.stats import number_text

L0_TOLERANCE = 0.1
"""Largest relative distance between the reached L0 and its target that counts as reaching it."""
NOTHING_LEFT = 0.99
"""Share of dead features from which nothing is left of an SAE."""


def reached(l0: float, target: float | None) -> bool | None:
    """Whether an L0 is near enough to its target; None without one."""
    return None if target is None else abs(l0 - target) <= L0_TOLERANCE * target


class Advised:
    """A result of training that says what went wrong and what to change."""

    explained_variance: Any
    """On rows that were not trained on; None if there is none."""
    dead_share: Any
    """Share of features that fire on none of them; None if there is none."""
    l0: Any
    """Features that fire on one of them, on average; None if there is none."""
    l0_target: Any
    """The L0 that was asked for, or None."""
    sparsity_weight: Any
    """Of the sparsity penalty at the end; None without a penalty."""

    @property
    def advice(self) -> str:
        """What went wrong and what to change; empty if nothing did."""
        if self.l0 is None or self.dead_share is None:
            return ""
        variance, target, weight = self.explained_variance, self.l0_target, self.sparsity_weight
        if self.dead_share >= NOTHING_LEFT or (variance is not None and variance < 0):
            fix = "--sparsity-weight or --lr" if target is None and weight else "--lr"
            return (
                f"explained variance {variance_text(variance)}, {self.dead_share:.0%} of the features dead: "
                f"training diverged or nothing is left; lower {fix}"
            )
        return "" if target is None or reached(self.l0, target) else _missed(self.l0, target, weight)


def variance_text(value: float | None) -> str:
    """An explained variance in a few characters, however far below 0 it is."""
    return number_text(value, ".4f" if value is None or value > -10 else ".3g")


def _missed(l0: float, target: float, weight: float | None) -> str:
    fix = ", or raise --l0" if l0 > target else ", or lower --l0: so many features do not fire"
    if weight is not None:
        side = "above" if l0 > target else "below"
        fix = f", or fix --sparsity-weight {side} {weight:.3g}, where it ended" if weight else ""
    return f"L0 {l0:.2f} was reached, not the {target:g} asked for; train on more rows (--rows){fix}"
