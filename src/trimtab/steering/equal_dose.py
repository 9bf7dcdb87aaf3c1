"""What a comparison must say about doses: realised ‖Δ‖/‖x‖ and the number of edits, and whether they agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trimtab.lm import EditLog


@dataclass(frozen=True, kw_only=True)
class DoseSummary:
    """Realised doses of one arm, over edited (token, site) pairs. An empty edit is none."""

    n_edits: int
    """Edited (token, site) pairs."""
    n_tokens: int
    """Edited tokens."""
    relative: float
    """Mean ‖Δ‖/‖x‖; 0 without edits."""
    relative_min: float
    relative_max: float
    absolute: float
    """Mean ‖Δ‖, in model units."""


def dose_summary(log: EditLog) -> DoseSummary:
    """Realised doses of a log."""
    log = log.take((log.feature >= 0).any(dim=1))
    if len(log) == 0:
        return DoseSummary(n_edits=0, n_tokens=0, relative=0.0, relative_min=0.0, relative_max=0.0, absolute=0.0)
    relative = log.relative_dose.double()
    return DoseSummary(
        n_edits=len(log),
        n_tokens=len(torch.stack([log.row, log.position], dim=1).unique(dim=0)),
        relative=float(relative.mean()),
        relative_min=float(relative.min()),
        relative_max=float(relative.max()),
        absolute=float(log.delta_norm.double().mean()),
    )


class UnequalDoseError(AssertionError):
    """Arms that were said to have equal doses do not."""


def assert_equal_dose(logs: Mapping[str, EditLog], tolerance: float = 0.01) -> dict[str, DoseSummary]:
    """Check that arms have the same mean ‖Δ‖/‖x‖ and the same number of edits, within a relative tolerance.

    Args:
        logs: by name of the arm; the first is the reference.
        tolerance: allowed relative difference of either.

    Returns:
        Every arm's summary.

    Raises:
        UnequalDoseError: an arm differs; the message names it and both numbers.
    """
    summaries = {name: dose_summary(log) for name, log in logs.items()}
    reference, *others = summaries
    for name in others:
        for field in ("relative", "n_edits"):
            expected, found = getattr(summaries[reference], field), getattr(summaries[name], field)
            if not abs(found - expected) <= tolerance * abs(expected):
                raise UnequalDoseError(f"{field} is {expected:.6g} for {reference} and {found:.6g} for {name}")
    return summaries
