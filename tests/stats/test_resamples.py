"""One set of resamples for many statistics: values, intervals and paired differences."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from trimtab.errors import UserError
from trimtab.stats import Resampled, Resamples, bootstrap_mean
from trimtab.stats.resamples import auc, column_mean, ratio

RNG = np.random.default_rng(3)


def test_auc_is_that_of_scikit_learn_under_weights_and_ties() -> None:
    score, positive = RNG.integers(0, 5, 40).astype(float), RNG.random(40) < 0.4
    weights = RNG.integers(0, 4, (6, 40)).astype(float)
    expected = [roc_auc_score(positive, score, sample_weight=w) for w in weights]
    np.testing.assert_allclose(auc(score, positive, weights), expected, atol=1e-12)


def test_auc_of_one_kind_alone_is_not_a_number_and_leaves_the_interval_alone() -> None:
    score, positive = np.array([0.0, 1, 2, 3, 4]), np.array([True, False, False, False, False])
    found = Resamples(np.arange(5), n_resamples=400).of(lambda w: auc(score, positive, w))
    assert np.isnan(found.draws).any()
    assert found.interval.estimate == 0.0
    assert found.interval.high == 0.0


def test_the_interval_of_a_mean_is_the_bootstraps() -> None:
    values = RNG.normal(size=50)
    found = Resamples(np.arange(50), n_resamples=20_000, seed=1).of(lambda w: ratio(values, np.ones(50), w)).interval
    expected = bootstrap_mean(values, n_resamples=20_000)
    assert found.estimate == pytest.approx(expected.estimate)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found.n == 50


def test_rows_of_a_unit_are_drawn_together() -> None:
    resamples = Resamples(["a", "b", "a", "c"], n_resamples=50)
    assert resamples.units == 3
    assert np.array_equal(resamples.weights[:, 0], resamples.weights[:, 2])
    assert (resamples.weights[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_a_difference_is_paired() -> None:
    values, resamples = RNG.normal(size=30), Resamples(np.arange(30))
    one, more = (resamples.of(lambda w, x=x: ratio(x, np.ones(30), w)) for x in (values, values + 2))
    difference = (more - one).interval
    assert (difference.low, difference.estimate, difference.high) == pytest.approx((2, 2, 2))
    mean = Resampled.mean([one, more])
    assert mean.estimate == pytest.approx(one.estimate + 1)
    np.testing.assert_allclose(mean.draws, one.draws + 1)


def test_column_means_leave_out_what_is_not_a_number() -> None:
    with np.errstate(invalid="ignore"):
        found = column_mean(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]))
    assert found[0] == 2
    assert np.isnan(found[1])


def test_nothing_to_resample_is_refused() -> None:
    with pytest.raises(UserError, match="there is nothing to resample"):
        Resamples([])
