from __future__ import annotations

import pytest
from scipy import stats

from trimtab.errors import UserError
from trimtab.stats import wilson_interval


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (1, 7), (12, 24), (99, 100), (3, 3)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_matches_scipy(successes: int, n: int, level: float) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    found = wilson_interval(successes, n, level=level)
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert (found.estimate, found.n) == (successes / n, n)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (4, 3), (-1, 3)])
def test_impossible_counts_are_named(successes: int, n: int) -> None:
    with pytest.raises(UserError, match=f"{successes} successes in {n} trials"):
        wilson_interval(successes, n)
