"""One set of resamples for many statistics: values, intervals and paired differences."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from trimtab.errors import UserError
from trimtab.stats import Resampled, Resamples, bootstrap_mean
from trimtab.stats.resamples import auc, balanced, column_mean, ratio

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
    found = column_mean(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]))
    assert found[0] == 2
    assert np.isnan(found[1])


def test_nothing_to_resample_is_refused() -> None:
    with pytest.raises(UserError, match="there is nothing to resample"):
        Resamples([])


def test_some_rows_have_the_same_resamples() -> None:
    resamples, values = Resamples(["a", "b", "a", "c", "c"], n_resamples=50), np.arange(5.0)
    rows = np.array([True, False, True, True, False])
    some = resamples.among(rows)
    assert some.units == 2
    assert np.array_equal(some.weights, resamples.weights[:, rows])
    assert some.of(lambda w: ratio(values[rows], np.ones(3), w)).n == 2
    assert resamples.weights.shape == (50, 5)


def test_the_mean_of_draws_has_their_spread_in_its_interval() -> None:
    """The variance of a mean of D values is their unbiased variance over D."""
    resamples, values = Resamples(np.arange(30), n_resamples=20_000), np.array([0.1, 0.4, 0.3])
    found = resamples.mean_of_draws([Resampled(value, np.full(20_000, value), 30) for value in values])
    assert found.estimate == pytest.approx(values.mean())
    assert found.draws.mean() == pytest.approx(values.mean(), abs=0.003)
    assert found.draws.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.03)
    sample = RNG.normal(size=30)
    one = resamples.of(lambda w: ratio(sample, np.ones(30), w))
    np.testing.assert_allclose(resamples.mean_of_draws([one]).draws, one.draws)
    both = [resamples.mean_of_draws([one, Resampled(one.estimate + s, one.draws + s, 30)]) for s in (1.0, 2.0)]
    difference = both[1] - both[0]  # the same draws are picked in both
    assert difference.draws.std() < both[1].draws.std()


def test_balanced_accuracy_is_that_of_scikit_learn_under_weights() -> None:
    said, yes = RNG.random(40) < 0.5, RNG.random(40) < 0.3
    weights = RNG.integers(0, 4, (6, 40)).astype(float)
    expected = [balanced_accuracy_score(yes, said, sample_weight=w) for w in weights]
    np.testing.assert_allclose(balanced(said, yes, weights), expected, atol=1e-12)
