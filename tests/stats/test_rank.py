from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trimtab.errors import UserError
from trimtab.stats import kendall_tau_b


def test_four_items_by_hand() -> None:
    """x ties one pair, y none: of the 5 pairs left 4 agree and 1 does not, so tau-b = 3 / sqrt(5 * 6)."""
    assert kendall_tau_b([1, 2, 2, 3], [1, 2, 4, 3], n_resamples=10).estimate == pytest.approx(3 / np.sqrt(30))


@pytest.mark.parametrize("n", [10, 200, 1_600])
def test_estimate_matches_scipy_with_ties(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.integers(0, 12, size=n)
    y = x + rng.integers(0, 12, size=n)
    assert kendall_tau_b(x, y, n_resamples=3).estimate == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


def test_pairwise_and_one_by_one_resampling_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 30, size=80).astype(float)
    y = x + 8 * rng.normal(size=80)
    pairwise = kendall_tau_b(x, y, n_resamples=3_000)
    monkeypatch.setattr("trimtab.stats.rank._PAIRWISE_UP_TO", 0)
    single = kendall_tau_b(x, y, n_resamples=1_500)
    assert single.estimate == pytest.approx(pairwise.estimate)
    assert [single.low, single.high] == pytest.approx([pairwise.low, pairwise.high], abs=0.02)


def test_interval_covers() -> None:
    """tau of a bivariate normal with correlation r is 2/pi * arcsin(r)."""
    rng = np.random.default_rng(1)
    correlation = 0.6
    truth = 2 / np.pi * np.arcsin(correlation)
    hits = 0
    for _ in range(400):
        x, noise = rng.normal(size=(2, 40))
        y = correlation * x + np.sqrt(1 - correlation**2) * noise
        hits += not kendall_tau_b(x, y, n_resamples=500).excludes(truth)
    assert 0.92 < hits / 400 < 0.985


def test_scores_that_rank_nothing_are_named() -> None:
    with pytest.raises(UserError, match="y: its 3 scores are all equal"):
        kendall_tau_b([1, 2, 3], [4, 4, 4])
    with pytest.raises(UserError, match="paired samples of 2 and 3"):
        kendall_tau_b([1, 2], [1, 2, 3])
