"""Kendall's τ_b against scipy and slow loops; coverage and p-values by simulation; each contract with a mutation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trimtab.errors import UserError
from trimtab.stats import RankScores, Resamples, highest_tau, kendall
from trimtab.stats.resamples import strata_of

FEW_LEVELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=5, max_size=40)


def tau_b(x: np.ndarray, y: np.ndarray) -> float:
    return RankScores({"x": x, "y": y}, n_resamples=1).tau("x", "y").estimate


def correlated(rng: np.random.Generator, n: int, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """Normal scores whose τ is known (Greiner 1909)."""
    r = math.sin(math.pi * tau / 2)
    x = rng.normal(size=n)
    return x, r * x + math.sqrt(1 - r * r) * rng.normal(size=n)


def three_models(rng: np.random.Generator, each: int, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = correlated(rng, 3 * each, tau)
    return x, y, np.repeat([0, 1, 2], each)


@settings(max_examples=200, deadline=None)
@given(FEW_LEVELS)
def test_tau_is_scipys_with_ties(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=float).T
    if len(set(x)) == 1 or len(set(y)) == 1:
        with pytest.raises(UserError, match="equal scores cannot be ranked"):
            tau_b(x, y)
    else:
        assert tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(FEW_LEVELS)
def test_shuffled_taus_are_scipys_with_ties(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=float).T
    if len(set(x)) > 1 and len(set(y)) > 1:
        scores = RankScores({"x": x, "y": y}, n_resamples=5)
        expected = [stats.kendalltau(x[shuffle], y).statistic for shuffle in scores.shuffles]
        np.testing.assert_allclose(scores.taus_of_rows(x[scores.shuffles], ["y"])[:, 0], expected, atol=1e-6)


def slow_tau(x: np.ndarray, y: np.ndarray, weights: np.ndarray, stratum: np.ndarray | None = None) -> float:
    """Pair by pair, as often as both of it were drawn."""
    top = x_untied = y_untied = 0.0
    for i in range(len(x)):
        for j in range(i):
            if stratum is None or stratum[i] == stratum[j]:
                weight, sx, sy = weights[i] * weights[j], np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
                top, x_untied, y_untied = top + weight * sx * sy, x_untied + weight * sx**2, y_untied + weight * sy**2
    return top / math.sqrt(x_untied * y_untied) if x_untied * y_untied else math.nan


@pytest.mark.parametrize("same_stratum", [False, True])
def test_the_bootstrap_is_a_slow_loops(same_stratum: bool) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, size=(2, 18)).astype(float)
    model = np.repeat([0, 1, 2], 6)
    scores = RankScores({"x": x, "y": y}, within=model, same_stratum=same_stratum, n_resamples=40)
    expected = [slow_tau(x, y, w, model if same_stratum else None) for w in scores.resamples.weights]
    np.testing.assert_allclose(scores.tau("x", "y").draws, expected, atol=1e-12)


def test_a_resample_of_one_stratum_is_scipys_tau_of_the_units_that_were_drawn() -> None:
    rng = np.random.default_rng(1)
    x, y = correlated(rng, 20, 0.4)
    scores = RankScores({"x": x, "y": y}, n_resamples=30)
    draws = scores.tau("x", "y").draws
    for weights, draw in zip(scores.resamples.weights, draws, strict=True):
        drawn = np.repeat(np.arange(20), np.round(weights * 19 / 20).astype(int))
        assert len(drawn) == 19
        assert draw == pytest.approx(stats.kendalltau(x[drawn], y[drawn]).statistic)


def test_resamples_within_strata_keep_their_sizes_and_have_the_right_spread() -> None:
    """Of a mean over strata of three: as many draws as units would give 2/3 of the variance."""
    values, stratum = np.array([0.0, 1, 5, 10, 11, 15]), np.repeat([4, 9], 3)
    found = Resamples(range(6), within=stratum, n_resamples=40_000)
    assert found.strata == 2
    np.testing.assert_allclose(found.weights[:, :3].sum(axis=1), 3)
    np.testing.assert_allclose(found.weights[:, 3:].sum(axis=1), 3)
    expected = sum(values[stratum == one].var(ddof=1) / 3 for one in (4, 9)) / 4
    assert (found.weights @ values / 6).var() == pytest.approx(expected, rel=0.03)


def test_one_unit_of_a_stratum_has_no_spread_so_all_units_become_one() -> None:
    assert set(strata_of(["a", "a", "b", "b"])) == {0, 1}
    assert set(strata_of(["a", "a", "b"])) == {0}


def partial_of_matrix(tau: np.ndarray) -> float:
    inverse = np.linalg.inv(tau)
    return float(-inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1]))


def test_partial_tau_is_that_of_the_inverse_matrix() -> None:
    rng = np.random.default_rng(2)
    z = rng.normal(size=(2, 40))
    table = np.stack([z[0] + rng.normal(size=40), z.sum(axis=0) + rng.normal(size=40), *z])
    scores = RankScores(dict(zip("xyzw", table, strict=True)), n_resamples=1)
    tau = np.array([[stats.kendalltau(a, b).statistic for b in table] for a in table])
    assert scores.tau("x", "y", ["z", "w"]).estimate == pytest.approx(partial_of_matrix(tau))
    assert scores.tau("x", "y", ["z"]).estimate == pytest.approx(partial_of_matrix(tau[:3, :3]))
    assert scores.tau("y", "x", ["w", "z"]).estimate == pytest.approx(partial_of_matrix(tau))


def covered(draw: Callable[[np.random.Generator], RankScores], truth: float, n: int, level: float = 0.95) -> float:
    rng = np.random.default_rng(3)
    hits: list[bool] = []
    for _ in range(n):
        scores = draw(rng)
        interval = scores.interval(scores.tau("x", "y"), level)
        hits.append(interval.low <= truth <= interval.high)
    return float(np.mean(hits))


def paper_like(each: int, tau: float) -> Callable[[np.random.Generator], RankScores]:
    def draw(rng: np.random.Generator) -> RankScores:
        x, y, model = three_models(rng, each, tau)
        return RankScores({"x": x, "y": y}, within=model, n_resamples=600)

    return draw


@pytest.mark.parametrize(("each", "tau"), [(5, 0.3), (10, 0.0), (10, 0.3), (30, 0.3)])
def test_intervals_cover(each: int, tau: float) -> None:
    """Standard error 0.011; 5 of each model is the number with one sparsity, 30 that of the paper's 90."""
    assert 0.92 < covered(paper_like(each, tau), tau, 400) < 0.99


def test_mutation_resampling_across_models_undercovers_what_models_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many draws as units, of strata of two: their spread is half of what it should be."""

    def plain(rng: np.random.Generator) -> RankScores:
        x, y = correlated(rng, 20, 0.3)
        return RankScores({"x": x, "y": y}, within=np.repeat(range(10), 2), n_resamples=400)

    assert covered(plain, 0.3, 300) > 0.93

    class AsManyAsUnits(Resamples):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType]
            drawn = np.random.default_rng(0).integers(2, size=(len(self.weights), 20)) + np.arange(20) // 2 * 2
            self.weights = np.stack([np.bincount(row, minlength=20) for row in drawn]).astype(float)

    monkeypatch.setattr(kendall, "Resamples", AsManyAsUnits)
    assert covered(plain, 0.3, 300) < 0.93


def test_the_least_bound_is_below_the_truth_once_in_twenty() -> None:
    rng = np.random.default_rng(4)
    bounds = []
    for _ in range(400):
        scores = paper_like(30, 0.3)(rng)
        bounds.append(scores.least_bound(scores.tau("x", "y")))
    assert 0.02 < np.mean(np.array(bounds) < 0.3) < 0.08


def test_thirty_independent_units_show_no_less_than_their_standard_error_allows() -> None:
    rng = np.random.default_rng(4)
    scores = [RankScores(dict(zip("xy", rng.normal(size=(2, 30)), strict=True)), n_resamples=600) for _ in range(60)]
    assert np.median([one.least_bound(one.tau("x", "y")) for one in scores]) > 1.645 * 0.129


def p_values(draw: Callable[[np.random.Generator], RankScores], given: list[str], n: int = 300) -> np.ndarray:
    rng = np.random.default_rng(5)
    return np.array([draw(rng).permutation_tests("x", ["y"], given)[0].p for _ in range(n)])


def apart(rng: np.random.Generator) -> RankScores:
    """Models differ in both scores, which have nothing to do with each other within a model."""
    model = np.repeat([0, 1, 2], 8)
    x, y = rng.normal(size=(2, 24)) + 1.5 * model
    return RankScores({"x": x, "y": y}, within=model, n_resamples=99)


def test_permutation_p_is_uniform_when_only_models_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    found = p_values(apart, [])
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(found <= 0.05) < 0.09
    monkeypatch.setattr(kendall, "strata_of", lambda labels: np.zeros(len(labels), dtype=int))
    assert np.mean(p_values(apart, []) <= 0.05) > 0.5  # mutation: shuffled across models


def owed(rng: np.random.Generator) -> RankScores:
    """Both scores owe all their agreement to a third."""
    z = rng.normal(size=40)
    x, y = z + 0.7 * rng.normal(size=(2, 40))
    return RankScores({"x": x, "y": y, "z": z}, n_resamples=99)


def test_partial_p_is_uniform_when_a_third_score_explains_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found = p_values(owed, ["z"])
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(p_values(owed, []) <= 0.05) > 0.9
    test = owed(np.random.default_rng(6)).permutation_tests("x", ["y"], ["z"])[0]
    assert test.expected > 0.05  # Kendall's partial τ is not 0 there
    shuffled = RankScores._shuffled
    monkeypatch.setattr(RankScores, "_shuffled", lambda self, x, given: shuffled(self, x, ()))
    assert np.mean(p_values(owed, ["z"]) <= 0.05) > 0.15  # mutation: x shuffled without what it has of z


def test_shuffles_spread_as_kendall_says() -> None:
    """n = 30: √(2(2n + 5) / 9n(n − 1)) = 0.129."""
    x, y = np.random.default_rng(7).normal(size=(2, 30))
    (test,) = RankScores({"x": x, "y": y}).permutation_tests("x", ["y"])
    assert test.spread == pytest.approx(math.sqrt(2 * 65 / (9 * 30 * 29)), rel=0.03)
    assert test.expected == pytest.approx(0, abs=0.005)
    assert test.p == pytest.approx(stats.kendalltau(x, y).pvalue, abs=0.015)


def test_shuffles_stay_within_strata() -> None:
    scores = apart(np.random.default_rng(8))
    model = np.repeat([0, 1, 2], 8)
    assert (model[scores.shuffles] == model).all()
    assert (np.sort(scores.shuffles) == np.arange(24)).all()
    assert (scores.shuffles[0] == np.arange(24)).all()


@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_the_highest_tau_is_that_of_one_truth_scored_twice(noise: float) -> None:
    rng = np.random.default_rng(9)
    truth = rng.normal(size=20_000)
    x_halves, y_halves = truth + noise * rng.normal(size=(2, 2, 20_000))
    halves = [stats.kendalltau(*both).statistic for both in (x_halves, y_halves)]
    found = highest_tau(*np.array(halves))
    reached = stats.kendalltau(x_halves.mean(axis=0), y_halves.mean(axis=0)).statistic
    assert found == pytest.approx(reached, abs=0.01)
    spearman_brown = [2 * tau / (1 + tau) for tau in halves]
    assert abs(math.sqrt(math.prod(spearman_brown)) - reached) > 0.03  # mutation: for τ itself


def test_halves_that_disagree_leave_nothing() -> None:
    assert highest_tau(np.array([-0.2, 1.0]), np.array([0.5, 1.0])).tolist() == pytest.approx([0, 1])


def few_levels(n: int) -> Callable[[np.random.Generator], RankScores]:
    """Scores of three or four levels whose τ_b is 0.66."""

    def draw(rng: np.random.Generator) -> RankScores:
        while True:
            x, y = correlated(rng, n, 0.6)
            x, y = np.round(1.5 * x), np.round(y)
            if len(set(x)) > 1 < len(set(y)):
                return RankScores({"x": x, "y": y}, n_resamples=400)

    return draw


def test_few_units_have_no_bounds_because_they_would_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = few_levels(7)(np.random.default_rng(0))
    assert math.isnan(scores.interval(scores.tau("x", "y")).high)
    assert covered(few_levels(8), 0.66, 300) > 0.92
    monkeypatch.setattr(kendall, "LEAST_FOR_BOUNDS", 5)
    assert covered(few_levels(5), 0.66, 200) < 0.9


def test_perfect_agreement_has_no_bounds() -> None:
    scores = RankScores({"x": range(20), "y": range(20)}, n_resamples=200)
    interval = scores.interval(scores.tau("x", "y"))
    assert interval.estimate == 1
    assert math.isnan(interval.low)
    assert math.isnan(scores.least_bound(scores.tau("x", "y")))


PUBLISHED = [
    *((0.298, 90), (0.218, 30), (0.458, 30), (0.306, 30)),
    *((0.320, 18), (-0.203, 18), (0.425, 18), (0.360, 18), (0.386, 18), (0.543, 15), (-0.219, 15)),
]


@pytest.mark.parametrize(("tau", "n"), PUBLISHED)
def test_published_taus_are_some_of_those_that_so_many_units_can_have(tau: float, n: int) -> None:
    """Without ties τ is a whole number over the pairs, even or odd as their number is (arXiv 2510.03659)."""
    pairs = n * (n - 1) // 2
    possible = np.arange(-pairs, pairs + 1, 2) / pairs
    assert np.abs(possible - tau).min() < 0.00065


def test_the_published_interval_is_as_wide_as_ours() -> None:
    """0.298 [0.159, 0.419] of 90 units."""
    rng = np.random.default_rng(10)
    widths = []
    for _ in range(60):
        scores = paper_like(30, 0.298)(rng)
        interval = scores.interval(scores.tau("x", "y"))
        widths.append(interval.high - interval.low)
    assert np.mean(widths) == pytest.approx(0.419 - 0.159, rel=0.1)


@pytest.mark.parametrize(
    ("scores", "within", "message"),
    [
        ({"x": [1, 2, 3, 4], "y": [1, 2, 3, 4]}, None, "x of 4 units: ranks need at least 5"),
        ({"x": [1, 2, 3, 4, math.nan], "y": range(5)}, None, "x: 1 of 5 values are not finite"),
        ({"x": [2.0] * 5, "y": range(5)}, None, "x: all 5 values are 2; equal scores cannot be ranked"),
        ({"x": range(6), "y": range(5)}, None, r"scores of \[5, 6\] units"),
        ({"x": range(5), "y": range(5)}, ["a"] * 4, r"scores of \[4, 5\] units"),
    ],
)
def test_mistakes_are_named(scores: dict[str, list[float]], within: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        RankScores(scores, within=within)
    assert "\n" not in error.value.line
