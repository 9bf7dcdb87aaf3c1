"""Typed doors to the few distribution functions of scipy that intervals need."""

from __future__ import annotations

from typing import cast

from scipy import special  # pyright: ignore[reportMissingTypeStubs]


def normal_cdf(x: float) -> float:
    """Φ(x)."""
    return float(cast(float, special.ndtr(x)))


def normal_quantile(p: float) -> float:
    """Φ⁻¹(p)."""
    return float(cast(float, special.ndtri(p)))


def student_quantile(p: float, df: float) -> float:
    """Quantile of Student's t with `df` degrees of freedom."""
    return float(cast(float, special.stdtrit(df, p)))
