"""What a trial of a model finds: when a difference is a fault, and when rounding by itself makes as large a one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property

import torch

from trimtab.lm.capabilities import Capabilities, percent
from trimtab.lm.precision import ProductPrecision
from trimtab.lm.upper_layers import allowed_difference

FAILS = "it fails"
"""How a reason begins that is an error."""
AS_ROUNDING = 4
"""Differences up to so many times those that rounding makes say nothing."""
HOPELESS = 0.5
"""Where so large ones say nothing, no difference says anything."""


class Findings:
    """What is off so far.

    Args:
        precision: what the model's products are computed in.
        rounding: how far the model's own logits move when its activations change by about their rounding, as a share of
            their spread. It is asked where a difference is larger than usual.
    """

    def __init__(self, precision: ProductPrecision, rounding: Callable[[], float]) -> None:
        self.off: dict[str, str] = {}
        self.differs: dict[str, float] = {}
        self.unsure: dict[str, str] = {}
        self.usual, self._rounding = allowed_difference(precision), rounding

    @cached_property
    def rounding(self) -> float:
        """`rounding`, measured once; 0 if it cannot be."""
        try:
            found = self._rounding()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a foreign model says to changed activations
            return 0.0
        return found if math.isfinite(found) else 0.0

    @property
    def capabilities(self) -> Capabilities:
        differs = {name: by for name, by in self.differs.items() if name in self.off}
        unsure = {name: why for name, why in self.unsure.items() if name not in self.off}
        return Capabilities(off=self.off, differs=differs, unsure=unsure)

    def fail(self, names: Iterable[str], reason: str, by: float | None = None) -> None:
        """Switch off, for the first reason that is found, with the difference if one was measured."""
        for name in names:
            if name not in self.off:
                self.off[name] = reason
                if by is not None:
                    self.differs[name] = by

    def restore(self, name: str) -> None:
        """Go back on what was found, to try it otherwise."""
        for found in (self.off, self.differs, self.unsure):
            found.pop(name, None)

    def compare(self, names: Iterable[str], reason: str, by: float) -> None:
        """Switch off what differs from the model's own logits, unless rounding makes as large a difference.

        Args:
            names: what is compared.
            reason: what is wrong if it differs.
            by: the difference, as a share of the logits' spread; NaN if it cannot be said.
        """
        if by <= self.usual:
            return
        names, least = list(names), AS_ROUNDING * self.rounding
        if math.isnan(by):
            self.fail(names, reason)
        elif by <= least or least > HOPELESS:
            rounding = f"changes of the size of rounding move them by {percent(self.rounding)}"
            self.unsure |= {name: f"{reason} (by {percent(by)}), but {rounding}" for name in names}
        else:
            self.fail(names, reason, by)


def said(error: Exception) -> str:
    """One line on what a model answered."""
    lines = str(error).strip().splitlines() or [""]
    return f"{FAILS} on a few random tokens ({type(error).__name__}: {lines[0][:120]})"
