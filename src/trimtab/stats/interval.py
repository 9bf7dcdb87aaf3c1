"""The one way in which a number with its uncertainty is carried, printed and stored."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its confidence interval. `str()` gives `0.42 [0.31, 0.53] (n=24)`."""

    estimate: float
    """The statistic on the data as observed."""
    low: float
    """Lower bound; NaN where the data cannot give one (a single prompt)."""
    high: float
    """Upper bound; NaN where the data cannot give one."""
    n: int
    """Number of independent units: prompts, documents or items, never tokens or seeds."""
    level: float = 0.95
    """Confidence level."""
    method: str = "bootstrap"
    """How the bounds were found."""

    def __str__(self) -> str:
        return self.format(2)

    def format(self, digits: int = 2) -> str:
        """The interval with `digits` places after the point."""
        return f"{self.estimate:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}] (n={self.n})"

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON; numbers that JSON cannot hold become None."""
        fields = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Interval:
        """The inverse of `to_dict`; a None becomes NaN."""
        restored: dict[str, Any] = {k: math.nan if v is None else v for k, v in fields.items()}
        return cls(**restored)
