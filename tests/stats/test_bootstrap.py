"""Bounds against closed forms, and coverage by simulation (standard error of a coverage of 0.95 over 600: 0.009)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from trimtab.errors import UserError
from trimtab.stats import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio_of_sums,
    bootstrap_statistic,
)
from trimtab.stats.resamples import Resamples


def width(interval: Interval) -> float:
    return interval.high - interval.low


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def coverage(draw: Callable[[np.random.Generator], Interval], truth: float, n_simulations: int = 600) -> float:
    rng = np.random.default_rng(7)
    return float(np.mean([covers(draw(rng), truth) for _ in range(n_simulations)]))


def test_mean_matches_students_interval_on_normal_data() -> None:
    values = stats.norm.ppf((np.arange(40) + 0.5) / 40, loc=3.0, scale=2.0)
    expected = stats.t.interval(0.95, 39, loc=values.mean(), scale=stats.sem(values))
    found = bootstrap_mean(values, n_resamples=40_000)
    assert found.estimate == pytest.approx(values.mean())
    assert [found.low, found.high] == pytest.approx(expected, abs=0.02 * width(found))
    assert found.n == 40


def test_level_sets_the_width() -> None:
    values = np.random.default_rng(0).normal(size=200)
    ratio = width(bootstrap_mean(values, level=0.99)) / width(bootstrap_mean(values, level=0.8))
    assert ratio == pytest.approx(stats.t.ppf(0.995, 199) / stats.t.ppf(0.9, 199), rel=0.04)


def test_same_seed_same_interval_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=37)
    first = bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) == first
    assert bootstrap_mean(values, seed=6) != first
    monkeypatch.setattr("trimtab.stats.bootstrap._BLOCK", 1_000)
    assert bootstrap_mean(values, seed=5) == first


def test_mean_covers_at_small_n() -> None:
    """Plain percentiles cover 0.89 here."""
    found = coverage(lambda rng: bootstrap_mean(rng.normal(size=10), n_resamples=1_000), 0.0, 2_000)
    assert 0.92 < found < 0.96


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_few_values_are_covered(n: int) -> None:
    found = coverage(lambda rng: bootstrap_mean(rng.normal(size=n), n_resamples=500), 0.0, 1_500)
    assert 0.93 < found < 0.97


@pytest.mark.parametrize(
    ("draw", "truth"), [(lambda rng: rng.random(3), 0.5), (lambda rng: rng.gamma(4, size=3), 4.0)], ids=["even", "skew"]
)
def test_three_values_of_another_shape_are_nearly_covered(draw: Callable[..., np.ndarray], truth: float) -> None:
    assert coverage(lambda rng: bootstrap_mean(draw(rng), n_resamples=500), truth, 1_500) > 0.9


def test_mutation_three_values_by_percentiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.stats.bootstrap.FEWEST", 2)
    assert coverage(lambda rng: bootstrap_mean(rng.normal(size=3), n_resamples=500), 0.0) < 0.8


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("n", [2, 5, 6])
def test_few_values_have_students_interval(n: int, level: float) -> None:
    values = np.random.default_rng(n).normal(size=n)
    expected = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    found = bootstrap_mean(values, level=level, n_resamples=40_000)
    assert [found.low, found.high] == pytest.approx(expected, abs=0.02 * width(found))
    assert found.method == "student"


def test_other_statistics_of_few_units_have_it_too() -> None:
    """A ratio of sums where all documents are alike in size is a mean; so is a paired difference."""
    top, other = np.random.default_rng(1).random((2, 5))
    mean = bootstrap_mean(top - other, n_resamples=40_000)
    ratio = bootstrap_ratio_of_sums(top - other, np.ones(5), n_resamples=40_000)
    pairs = bootstrap_difference(top, other, n_resamples=40_000)
    of_units = Resamples(np.arange(5), n_resamples=40_000).of(lambda w: w @ (top - other) / w.sum(axis=1)).interval
    for found in (ratio, pairs, of_units):
        assert [found.low, found.high] == pytest.approx([mean.low, mean.high], abs=0.03 * width(mean))


def test_few_equal_values_have_no_width() -> None:
    found = bootstrap_mean([0.25] * 4)
    assert (found.low, found.high) == (0.25, 0.25)


def test_from_seven_values_on_bounds_are_percentiles() -> None:
    values = np.array([0.0] * 6 + [9.0])
    assert bootstrap_mean(values).low == 0.0
    assert bootstrap_mean(values[1:]).low < 0.0


def test_mean_covers_for_rates() -> None:
    found = coverage(lambda rng: bootstrap_mean(rng.random(40) < 0.3, n_resamples=1_000), 0.3)
    assert 0.92 < found < 0.98


def nested_sample(rng: np.random.Generator, n_seeds: int, n_prompts: int, between: float, within: float) -> np.ndarray:
    return between * rng.normal(size=n_prompts) + within * rng.normal(size=(n_seeds, n_prompts))


@pytest.mark.parametrize(("between", "within"), [(1.0, 0.2), (0.2, 1.0)])
def test_nested_seeds_cover(between: float, within: float) -> None:
    found = coverage(lambda rng: bootstrap_mean(nested_sample(rng, 4, 15, between, within), n_resamples=1_000), 0.0)
    assert 0.925 < found < 0.975


def test_more_seeds_of_the_same_prompts_are_not_more_prompts() -> None:
    sample = np.random.default_rng(1).normal(size=12)
    assert width(bootstrap_mean(np.tile(sample, (10, 1)))) == pytest.approx(width(bootstrap_mean(sample)))
    assert bootstrap_mean(np.tile(sample, (10, 1))).n == 12


def test_paired_difference_removes_what_prompts_share() -> None:
    rng = np.random.default_rng(2)
    prompts = 10 * rng.normal(size=50)
    a, b = prompts + 1 + 0.1 * rng.normal(size=50), prompts + 0.1 * rng.normal(size=50)
    paired, unpaired = bootstrap_difference(a, b), bootstrap_difference(a, b, paired=False)
    assert paired.estimate == pytest.approx((a - b).mean())
    assert unpaired.estimate == pytest.approx((a - b).mean())
    assert width(paired) == pytest.approx(2 * stats.t.ppf(0.975, 49) * stats.sem(a - b), rel=0.05)
    assert not covers(paired, 0)
    assert covers(unpaired, 0)


def test_unpaired_difference_matches_welch() -> None:
    a = stats.norm.ppf((np.arange(30) + 0.5) / 30)
    b = 3 * stats.norm.ppf((np.arange(45) + 0.5) / 45) + 1
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    found = bootstrap_difference(a, b, paired=False, n_resamples=40_000)
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=0.025 * width(found))


def test_paired_seeds_may_differ_in_number() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(3, 20)), rng.normal(size=(5, 20))
    assert bootstrap_difference(a, b) == bootstrap_mean(a.mean(0) - b.mean(0))


def test_ratio_of_sums_matches_the_delta_method() -> None:
    rng = np.random.default_rng(4)
    tokens = rng.integers(50, 500, size=300).astype(float)
    residual = tokens * rng.gamma(20, 0.01, size=300)
    ratio = residual.sum() / tokens.sum()
    error = math.sqrt(((residual - ratio * tokens) ** 2).sum()) / tokens.sum()
    found = bootstrap_ratio_of_sums(residual, tokens)
    assert found.estimate == pytest.approx(ratio)
    assert width(found) == pytest.approx(2 * 1.96 * error, rel=0.05)
    explained = bootstrap_ratio_of_sums(residual, tokens, transform=lambda r: 1 - r)
    assert explained.estimate == pytest.approx(1 - ratio)
    assert [explained.low, explained.high] == pytest.approx([1 - found.high, 1 - found.low])


def test_ratio_of_sums_weighs_documents_by_size() -> None:
    assert bootstrap_ratio_of_sums([1.0, 90.0], [10.0, 100.0]).estimate == pytest.approx(91 / 110)


def test_statistic_of_single_rows_matches_the_mean() -> None:
    values = np.random.default_rng(5).normal(size=60)
    generic = bootstrap_statistic(lambda x: float(x.mean()), [values], n_resamples=10_000)
    direct = bootstrap_mean(values)
    assert [generic.estimate, generic.low, generic.high] == pytest.approx(
        [direct.estimate, direct.low, direct.high], abs=0.04 * width(direct)
    )


def test_statistic_resamples_whole_groups_in_any_row_order() -> None:
    """Tokens that repeat their document add nothing; shuffled rows keep their document."""
    rng = np.random.default_rng(6)
    documents = rng.normal(size=40)
    labels = rng.permutation(np.repeat(np.arange(40), 25))
    found = bootstrap_statistic(lambda x: float(x.mean()), [documents[labels]], groups=labels, n_resamples=6_000)
    assert found.n == 40
    assert width(found) == pytest.approx(width(bootstrap_mean(documents)), rel=0.05)


def test_statistic_keeps_rows_of_all_arrays_together_in_unequal_groups() -> None:
    rng = np.random.default_rng(7)
    labels = np.repeat(np.arange(10), np.arange(1, 11)).astype(str)
    x = rng.normal(size=(labels.size, 2))
    seen: list[int] = []

    def slope(a: np.ndarray, b: np.ndarray, names: np.ndarray) -> float:
        seen.append(len(names))
        sizes = {name: int((names == name).sum()) for name in set(names)}
        assert all(size % (int(name) + 1) == 0 for name, size in sizes.items()), "a group came in part"
        return float(np.allclose(a[:, 0] * 3, b))

    found = bootstrap_statistic(slope, [x, 3 * x[:, 0], labels], groups=labels, n_resamples=200)
    assert (found.estimate, found.low, found.high) == (1.0, 1.0, 1.0)
    assert len(set(seen)) > 10


def test_one_prompt_gives_no_bounds() -> None:
    found = bootstrap_mean([0.7])
    assert found.estimate == 0.7
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([]), "values: there are no values; score at least one prompt"),
        (lambda: bootstrap_mean([1.0, math.nan]), "1 of 2 values are not finite"),
        (lambda: bootstrap_mean(np.zeros((2, 2, 2))), r"shape \(2, 2, 2\)"),
        (lambda: bootstrap_mean([1.0, 2.0], level=95), "level 95"),
        (lambda: bootstrap_difference([1.0], [1.0, 2.0]), "paired samples of 1 and 2"),
        (lambda: bootstrap_ratio_of_sums([1.0], [0.0]), "sum to zero"),
        (lambda: bootstrap_statistic(float, [np.zeros(3)], groups=[1, 2]), r"lengths \[2, 3\]"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
