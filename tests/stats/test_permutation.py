from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trimtab.errors import UserError
from trimtab.stats import permutation_test


def difference_of_means(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return a.mean(axis=axis) - b.mean(axis=axis)


def test_three_pairs_by_hand() -> None:
    """Of the eight sign patterns of 1, 2, 3 two have |sum| = 6, and one has sum = 6."""
    found = permutation_test([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert (found.difference, found.p_value, found.n_permutations, found.exact) == (2.0, 2 / 8, 8, True)
    assert permutation_test([1.0, 2.0, 3.0], [0.0] * 3, alternative="greater").p_value == 1 / 8
    assert permutation_test([1.0, 2.0, 3.0], [0.0] * 3, alternative="less").p_value == 1.0


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("paired", [True, False])
def test_exact_matches_scipy(paired: bool, alternative: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, size=8).astype(float), rng.integers(0, 4, size=8).astype(float)
    expected = stats.permutation_test(
        (a, b),
        difference_of_means,
        permutation_type="samples" if paired else "independent",
        alternative=alternative,
        n_resamples=np.inf,
    )
    found = permutation_test(a, b, paired=paired, alternative=alternative, n_permutations=13_000)  # type: ignore[arg-type]
    assert found.exact
    if alternative == "two-sided" and not paired:  # scipy doubles the smaller tail; here |difference| is the order
        draws = np.abs(expected.null_distribution) >= abs(expected.statistic) - 1e-12
        assert found.p_value == pytest.approx(draws.mean())
    else:
        assert found.p_value == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("paired", [True, False])
def test_drawn_permutations_approach_the_exact_value(paired: bool) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.6, size=9), rng.normal(size=9)
    exact = permutation_test(a, b, paired=paired, n_permutations=50_000)
    drawn = permutation_test(a, b, paired=paired, n_permutations=500)
    assert exact.exact
    assert not drawn.exact
    assert drawn.p_value == pytest.approx(exact.p_value, abs=4 * np.sqrt(exact.p_value / 500))
    assert drawn == permutation_test(a, b, paired=paired, n_permutations=500)


@pytest.mark.parametrize("paired", [True, False])
def test_p_values_are_uniform_without_a_difference(paired: bool) -> None:
    rng = np.random.default_rng(2)
    p = [
        permutation_test(rng.normal(size=20), rng.normal(size=20), paired=paired, n_permutations=199).p_value
        for _ in range(400)
    ]
    assert min(p) >= 1 / 200
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_seeds_are_averaged_within_their_prompt() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(4, 10)), rng.normal(size=(2, 10))
    assert permutation_test(a, b) == permutation_test(a.mean(0), b.mean(0))


def test_unpaired_samples_may_differ_in_size() -> None:
    found = permutation_test([5.0, 6.0, 7.0], [1.0], paired=False)
    assert (found.p_value, found.n_permutations) == (1 / 4, 4)


def test_identical_samples_give_one() -> None:
    assert permutation_test([0.1] * 30, [0.1] * 30).p_value == 1.0


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="paired samples of 2 and 3"):
        permutation_test([1, 2], [1, 2, 3])
    with pytest.raises(UserError, match="n_permutations 0"):
        permutation_test([1, 2], [1, 2], n_permutations=0)
