from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from trimtab.errors import UserError
from trimtab.stats import crossed_mean, student_mean


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


def test_crossed_matches_students_where_only_trainings_or_only_prompts_differ() -> None:
    values = np.random.default_rng(0).normal(size=7)
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    for sample, n in ((np.tile(values[:, None], 9), 9), (np.tile(values, (4, 1)), 7)):
        found = crossed_mean(sample)
        assert [found.low, found.high] == pytest.approx([expected.low, expected.high], rel=1e-9)
        assert (found.estimate, found.n) == (pytest.approx(values.mean()), n)


@pytest.mark.parametrize(
    ("trainings", "prompts", "both"),
    [(1.0, 0.1, 0.3), (0.05, 0.2, 0.4), (0.15, 0.2, 0.4), (0.0, 0.3, 0.3)],
    ids=["trainings differ", "prompts differ", "both differ", "trainings are alike"],
)
def test_crossed_covers_for_three_trainings(trainings: float, prompts: float, both: float) -> None:
    """Standard error of the coverage: 0.006. Prompts alone, trainings inside, would cover 0.1 of the first."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(1_500):
        sample = trainings * rng.normal(size=(3, 1)) + prompts * rng.normal(size=200) + both * rng.normal(size=(3, 200))
        found = crossed_mean(sample)
        held += found.low <= 0 <= found.high
    assert 0.905 < held / 1_500 < 0.99


def test_crossed_needs_two_of_each() -> None:
    for sample in ([0.2, 0.4], [[0.2, 0.4]], [[0.2], [0.4]]):
        found = crossed_mean(sample)
        assert found.estimate == pytest.approx(0.3)
        assert math.isnan(found.low)
        assert math.isnan(found.high)
