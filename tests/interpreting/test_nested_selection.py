"""Nested selection against loops, and in simulation: noise lifts nothing, planted signal does, keeping the best lifts
anything."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from trimtab.errors import UserError
from trimtab.interpreting import mean_lifts, mean_pairs, select_nested
from trimtab.interpreting.nested_selection import NestedSelection

CHOOSING = np.arange(10) < 5
SHARES = (0.1, 0.25, 0.5)


def tables(seed: int, n: int, *, planted: float = 0.0, features: int = 20) -> list[NestedSelection]:
    """Selections of noise with features that differ; the highest scores of one criterion may be planted to steer."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        score = rng.normal(size=features)
        utility = 0.4 * rng.normal(size=(features, 1, 1)) + 0.4 * rng.normal(size=(features, 4, 10))
        utility[np.argsort(-score)[: features // 5]] += planted
        rankings = {"knows": score, "guesses": rng.normal(size=features)}
        found.append(select_nested(utility, rankings, CHOOSING, n_random=50))
    return found


def test_equals_loops() -> None:
    """Mutation: take the subset's size, or its end, from the half that is reported."""
    rng = np.random.default_rng(4)
    utility, score = rng.normal(size=(14, 3, 10, 2)), rng.normal(size=14)
    found = select_nested(utility, {"c": score}, CHOOSING, shares=SHARES, seed=7, n_random=3).criteria[0]
    report = []
    first = []
    for feature in utility:
        doses = [np.mean([feature[d, i].mean() for i in range(5)]) for d in range(3)]
        best = int(np.argmax(doses))
        first.append(doses[best])
        report.append(np.mean([feature[best, i].mean() for i in range(5, 10)]))

    def subset(ids: list[int], up: bool, share: float) -> list[int]:
        return sorted(ids, key=lambda i: -score[i] if up else score[i])[: max(1, round(share * len(ids)))]

    def best_of(ids: list[int], values: list[float]) -> tuple[bool, float]:
        tried = [(up, share) for up in (True, False) for share in SHARES]
        return max(tried, key=lambda one: np.mean([values[i] for i in subset(ids, *one)]))

    halves = [half.tolist() for half in np.array_split(np.random.default_rng(7).permutation(14), 2)]
    lifts = []
    for half, other in (halves, halves[::-1]):
        chosen = subset(half, *best_of(other, first))
        lifts.append(np.mean([report[i] for i in chosen]) - np.mean([report[i] for i in half]))
    assert found.lift.estimate == pytest.approx(np.mean(lifts), rel=1e-12)
    kept = subset(list(range(14)), *best_of(list(range(14)), report))
    assert found.kept_score == pytest.approx(np.mean([report[i] for i in kept]), rel=1e-12)
    assert found.kept_lift == pytest.approx(found.kept_score - np.mean(report), rel=1e-9)
    assert found.curse.estimate == pytest.approx(found.kept_lift - found.lift.estimate, rel=1e-9)
    assert found.kept.size == len(kept)


def test_the_interval_of_a_half_is_students() -> None:
    """Two groups with one spread, against scipy's pooled test."""
    from trimtab.interpreting.nested_selection import _contrast

    u = np.random.default_rng(1).normal(size=11)
    found = _contrast(u, np.where(np.arange(11) < 4, 1 / 4, 0.0))
    expected = stats.ttest_ind(u[:4], u[4:], equal_var=True).confidence_interval()
    # The mean of all holds 4/11 of the subset itself.
    assert [found.low, found.high] == pytest.approx([expected.low * 7 / 11, expected.high * 7 / 11], rel=1e-9)


def test_noise_is_lifted_by_keeping_the_best_alone() -> None:
    """Mutation: choose on the half that is reported; then the nested lift is as large as the kept one."""
    found = [one.criteria[1] for one in tables(1, 500)]
    kept = np.array([one.kept_lift for one in found])
    nested = np.array([one.lift.estimate for one in found])
    assert kept.mean() > 10 * kept.std() / len(kept) ** 0.5
    assert kept.mean() == pytest.approx(np.mean([one.random_kept.mean for one in found]), rel=0.1)
    assert abs(nested.mean()) < 3 * nested.std() / len(nested) ** 0.5
    held = np.mean([one.lift.low <= 0 <= one.lift.high for one in found])
    assert 0.93 < held < 0.99
    # Random rankings go through the same procedure, so that their share is a p-value: its error here is 0.01.
    assert np.mean([one.p_value <= 0.1 for one in found]) == pytest.approx(0.1, abs=0.04)


def test_planted_signal_is_found_by_both() -> None:
    """Mutation: rank only one end, the lowest scores."""
    pooled = mean_lifts(tables(2, 40, planted=1.5))
    knows, guesses = pooled
    assert knows.lift.low > 0.5
    assert knows.kept_lift.low > 0.5
    assert knows.curse.low > 0
    assert guesses.lift.low < 0.1
    assert guesses.lift.estimate < knows.lift.estimate / 3


def test_one_criterion_over_another() -> None:
    (one,) = tables(3, 1, planted=2.0, features=60)
    (pair,) = one.pairs
    a, b = one.criteria
    assert (pair.criterion, pair.over) == ("knows", "guesses")
    assert pair.difference.estimate == pytest.approx(a.lift.estimate - b.lift.estimate, rel=1e-9)
    assert pair.difference.low > 0
    assert a.p_value < 0.05
    same = select_nested(
        np.random.default_rng(0).normal(size=(12, 2, 10)), dict.fromkeys("xy", np.arange(12)), CHOOSING
    )
    assert same.pairs[0].difference.high == pytest.approx(0, abs=1e-12)


def test_one_criterion_over_another_in_many_tables() -> None:
    """Mutation: take intervals over features, or subtract kept lifts from nested ones."""
    many = tables(6, 12, planted=2.0)
    (pair,) = mean_pairs(many)
    nested, kept = ([getattr(a, name) - getattr(b, name) for a, b in (one.criteria for one in many)]
                    for name in ("score", "kept_lift"))  # fmt: skip
    for found, differences in ((pair.difference, nested), (pair.kept_difference, kept)):
        expected = stats.ttest_1samp(differences, 0).confidence_interval()
        assert [found.estimate, found.low, found.high] == pytest.approx([np.mean(differences), *expected])
    assert pair.difference.low > 0
    with pytest.raises(UserError, match="they have different criteria"):
        mean_pairs([many[0], select_nested(np.ones((12, 2, 10)), {"x": np.arange(12)}, CHOOSING, n_random=2)])


def test_gaps_are_left_out_and_counted() -> None:
    """Mutation: read a gap as 0."""
    utility = np.random.default_rng(5).normal(5, 1, size=(13, 2, 10))
    score = np.arange(13.0)
    without = select_nested(np.delete(utility, 3, axis=0), {"c": np.delete(score, 3)}, CHOOSING)
    utility[3, :, 5:] = np.nan  # never reported
    found = select_nested(utility, {"c": score}, CHOOSING)
    assert (found.gaps, found.features) == (1, 12)
    assert found.base == without.base
    assert found.criteria[0].lift == without.criteria[0].lift
    utility[4, 0, :2] = np.nan  # some of an instruction's: the mean of the others stands
    assert select_nested(utility, {"c": score}, CHOOSING).gaps == 1


def refused(score: NDArray[np.float64], shape: tuple[int, ...], choosing: NDArray[np.bool_]) -> str:
    with pytest.raises(UserError) as error:
        select_nested(np.zeros(shape), {"c": score}, choosing)
    return str(error.value)


def test_what_does_not_fit_is_refused() -> None:
    assert "8 are needed" in refused(np.zeros(7), (7, 2, 10), CHOOSING)
    assert "finite numbers" in refused(np.full(9, np.nan), (9, 2, 10), CHOOSING)
    assert "[features, doses, instructions" in refused(np.zeros(9), (9, 2, 8), CHOOSING)
    assert "keep some for each" in refused(np.zeros(9), (9, 2, 10), CHOOSING | True)
    with pytest.raises(UserError, match="a subset is a share"):
        select_nested(np.zeros((9, 2, 10)), {"c": np.zeros(9)}, CHOOSING, shares=[2])
    with pytest.raises(UserError, match="the same ones"):
        mean_lifts([])


def test_tables_say_both() -> None:
    (one,) = tables(3, 1)
    frame = one.to_frame()
    assert list(frame["criterion"]) == ["knows", "guesses"]
    assert "keeping the best says" in one.headline()


def test_random_is_no_criterion_that_finds_anything() -> None:
    """Mutation: announce the criterion with the highest lift, whichever it is."""
    utility = np.random.default_rng(5).normal(5, 1, size=(20, 1, 1)) + np.zeros((20, 2, 10))
    found = select_nested(utility, {"c": np.arange(20.0), "random": utility[:, 0, 0]}, CHOOSING)
    c, random = found.criteria
    assert random.lift.estimate > c.lift.estimate
    assert f"c finds those that steer better by {c.lift:+.3f} (random subsets {c.random.mean:+.3f})" in found.headline()
