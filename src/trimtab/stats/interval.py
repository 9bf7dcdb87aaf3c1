"""The one way in which a number with its uncertainty is carried, printed and stored."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
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
        return f"{self:.2f} (n={self.n})"

    def __format__(self, form: str) -> str:
        """Estimate and bounds, each in a number's format: `+.3f` gives `+0.422 [+0.314, +0.530]`."""
        if not form:
            return str(self)
        return f"{number_text(self.estimate, form)} {self.bounds(form)}".rstrip()

    def bounds(self, form: str) -> str:
        """The bounds alone, in brackets; empty where there are none."""
        return "" if math.isnan(self.low) else f"[{number_text(self.low, form)}, {number_text(self.high, form)}]"

    def scaled(self, factor: float) -> Interval:
        """The interval of a multiple, such as points of 100."""
        return replace(self, estimate=self.estimate * factor, low=self.low * factor, high=self.high * factor)

    def within(self, least: float, most: float = math.inf) -> Interval:
        """The part of it that a quantity can have, such as 0 to 1 of a share; it holds the truth as often."""
        low, high = (bound if math.isnan(bound) else min(max(bound, least), most) for bound in (self.low, self.high))
        return replace(self, low=low, high=high)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON; numbers that JSON cannot hold become None."""
        fields = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Interval:
        """The inverse of `to_dict`; a None becomes NaN."""
        restored: dict[str, Any] = {k: math.nan if v is None else v for k, v in fields.items()}
        return cls(**restored)


def interval_of(fields: dict[str, Any] | None) -> Interval | None:
    """An interval, if any, from what `to_dict` made of it."""
    return None if fields is None else Interval.from_dict(fields)


def number_text(value: float | Interval | None, form: str) -> str:
    """A number, or an estimate with its interval, in a number's format; a dash where there is none.

    The one formatter: every table, page and sentence with a number that may be missing goes through it. What a format
    of whole numbers (`,d`) cannot hold keeps its decimals; an infinity is `∞`.
    """
    number = value.estimate if isinstance(value, Interval) else value
    if number is None or math.isnan(number):
        return "–"
    if isinstance(value, Interval):
        return format(value, form)
    if math.isinf(number):
        return "−∞" if number < 0 else "+∞" if "+" in form else "∞"
    if form.endswith("d"):
        return format(int(number), form) if number == int(number) else format(number, f"{form[:-1]}.6g")
    return format(number, form)
