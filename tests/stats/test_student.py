from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from trimtab.errors import UserError
from trimtab.stats import student_mean


@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_matches_scipy(n: int, level: float) -> None:
    values = np.random.default_rng(n).normal(3, 2, n)
    expected = stats.ttest_1samp(values, 0).confidence_interval(level)
    found = student_mean(values, level=level)
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], rel=1e-12)
    assert (found.estimate, found.n, found.level) == (pytest.approx(values.mean()), n, level)


def test_one_value_has_no_bounds() -> None:
    found = student_mean([0.5])
    assert found.estimate == 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_not_finite_values_are_named() -> None:
    with pytest.raises(UserError, match="1 of 2 values are not finite"):
        student_mean([1.0, math.nan])
