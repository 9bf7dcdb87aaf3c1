"""Banks whose truth is planted, against scipy; each contract with a mutation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from trimtab.errors import UserError
from trimtab.interpreting import RankAgreement, ScoredSAE, rank_agreement, read_scored_saes, simulate_saes
from trimtab.interpreting.agreement import AMOUNTS, FACTORS, MEASURED, ONE_MODEL


def agreement(saes: Any, n_resamples: int = 400) -> RankAgreement:
    return rank_agreement(saes, n_resamples=n_resamples)


def column(saes: list[ScoredSAE], name: str) -> np.ndarray:
    return np.array([getattr(sae, name) for sae in saes], dtype=float)


def independent(seed: int = 1) -> list[ScoredSAE]:
    return simulate_saes(0.0, seed=seed)


def test_an_independent_bank_holds_0_and_one_that_agrees_is_high() -> None:
    none, high = agreement(independent()).of(), agreement(simulate_saes(0.8, noise=0.3, seed=1)).of()
    assert none.tau.low < 0 < none.tau.high
    assert none.p > 0.05
    assert none.least_bound < 0.25
    assert high.tau.estimate > 0.65
    assert high.tau.low > 0.55
    assert high.p < 0.01
    assert high.expected == pytest.approx(0, abs=0.05)


def test_independent_banks_hold_0_at_the_nominal_rate() -> None:
    found = [rank_agreement(_scores_alone(independent(seed)), n_resamples=200).of() for seed in range(60)]
    assert 0.85 < np.mean([one.tau.low < 0 < one.tau.high for one in found]) <= 1
    assert np.mean([one.p <= 0.05 for one in found]) < 0.15


def _scores_alone(saes: list[ScoredSAE]) -> list[ScoredSAE]:
    """Fewer numbers to compute, and nothing that varies between the groups of a kind."""
    return [
        ScoredSAE(
            model=sae.model,
            architecture="topk",
            sparsity=50,
            interpretability=sae.interpretability,
            utility=sae.utility,
        )
        for sae in saes
    ]


def test_every_group_has_scipys_tau() -> None:
    saes = simulate_saes(0.3)
    found = agreement(saes, 50)
    before, after = column(saes, "utility"), np.array([sae.selected["added"] for sae in saes])
    utilities = {"before selection": before, "after added": after, "gain by added": (after - before) / before}
    x = column(saes, "interpretability")
    groups = {"all": np.ones(90, dtype=bool), **{m: np.array([s.model == m for s in saes]) for m in "ABC"}}
    groups |= {a: np.array([s.architecture == a for s in saes]) for a in ("topk", "gated")}
    groups |= {"L0 50": np.array([s.sparsity == 50 for s in saes])}
    for group, members in groups.items():
        for against, y in utilities.items():
            one = found.of(group, against)
            assert one.n == members.sum()
            assert one.tau.estimate == pytest.approx(stats.kendalltau(x[members], y[members]).statistic)
    assert len(found.agreements) == (2 + 5 + 6 + 3) * 3
    one_model = [stats.kendalltau(x[groups[m]], before[groups[m]]).statistic for m in "ABC"]
    assert found.of(ONE_MODEL).tau.estimate == pytest.approx(np.mean(one_model))
    change = found.of("all", "after added").change
    assert change is not None
    assert change.estimate == pytest.approx(found.of("all", "after added").tau.estimate - found.of().tau.estimate)
    assert all(a.adjusted_p > a.p - 1e-9 for a in found.agreements)


def test_models_that_differ_in_both_scores_are_no_agreement() -> None:
    saes = [
        replace(sae, interpretability=sae.interpretability + shift, utility=sae.utility + shift)
        for sae in independent()
        for shift in ["ABC".index(sae.model)]
    ]
    found = agreement(saes)
    assert found.of().tau.low > 0.5
    assert found.of().p > 0.05
    assert found.of().expected == pytest.approx(found.of().tau.estimate, abs=0.1)
    assert abs(found.of(ONE_MODEL).tau.estimate) < 0.2
    one_model = [replace(sae, model="A") for sae in saes]
    assert agreement(one_model).of().p < 0.01  # mutation: models are not known


def test_gain_turns_agreement_around_if_selection_adds_and_not_if_it_multiplies() -> None:
    """What selection adds is independent of all else: the better an SAE is before, the less it gains in percent."""
    cases = {one.case: one for one in agreement(simulate_saes(0.5)).gains}
    assert cases[MEASURED].after.low > 0
    assert cases[MEASURED].gain.high < 0
    assert cases[AMOUNTS].gain.high < -0.1
    assert cases[AMOUNTS].gain.low < cases[MEASURED].gain.estimate < cases[AMOUNTS].gain.high
    assert cases[AMOUNTS].after.estimate == pytest.approx(cases[MEASURED].after.estimate, abs=0.1)
    assert cases[AMOUNTS].before_gain.high < -0.3
    assert cases[FACTORS].gain.low < 0 < cases[FACTORS].gain.high
    assert cases[FACTORS].gain.estimate == pytest.approx(0, abs=0.03)
    assert cases[FACTORS].after.low > 0


def test_mutation_gain_in_points_has_no_such_bias() -> None:
    saes = simulate_saes(0.5)
    added = np.array([sae.selected["added"] - sae.utility for sae in saes])
    assert abs(stats.kendalltau(column(saes, "interpretability"), added).statistic) < 0.12


def test_shuffled_amounts_stay_within_models() -> None:
    """One model gains a hundredfold: dealt to others, it would decide over τ of before and gain."""
    saes = [
        replace(sae, selected={"added": sae.utility + (100 if sae.model == "A" else 1) * (1 + 1e-6 * i)})
        for i, sae in enumerate(independent())
    ]
    case = next(one for one in agreement(saes).gains if one.case == AMOUNTS)
    before = column(saes, "utility")
    gain = np.array([sae.selected["added"] for sae in saes]) / before - 1
    assert case.before_gain.estimate == pytest.approx(stats.kendalltau(before, gain).statistic, abs=0.01)


def test_what_explained_variance_accounts_for_is_partialled_out() -> None:
    found = agreement(simulate_saes(0.0, shared=0.7, noise=0.3, seed=2))
    partial = {(one.given, one.against): one for one in found.partial}
    before = partial["explained variance", "before selection"]
    assert found.of().tau.low > 0.2
    assert found.of().p < 0.01
    assert before.p > 0.05
    assert before.expected > 0.02  # so that a test against 0 would be wrong
    assert before.tau.low < before.expected < before.tau.high
    assert partial["dead share", "before selection"].p < 0.01  # mutation: given what explains nothing
    assert partial["explained variance and dead share", "before selection"].p > 0.05


@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_scores_of_one_truth_reach_the_highest_tau(noise: float) -> None:
    found = agreement(simulate_saes(1.0, noise=noise, seed=3))
    highest = found.highest[ONE_MODEL]  # the levels of models are not one truth
    assert highest.low - 0.05 < found.of(ONE_MODEL).tau.estimate < highest.high + 0.05
    halves = {one.score: one.halves.estimate for one in found.reliability if one.group == ONE_MODEL}
    assert set(halves) == {"interpretability", "utility"}
    assert math.sqrt(math.prod(halves.values())) < highest.estimate - 0.03  # mutation: halves as if they were the whole


def test_noisier_parts_lower_the_highest_tau() -> None:
    low, high = (agreement(simulate_saes(1.0, noise=n, seed=3)).highest["all"] for n in (6.0, 0.5))
    assert low.high < high.low
    assert high.estimate > 0.85


def test_two_parts_are_halves_as_they_are_and_more_are_dealt() -> None:
    saes = simulate_saes(0.3, n_parts=2)
    (one, *_) = agreement(saes, 50).reliability
    first, second = np.array([sae.interpretability_parts for sae in saes]).T
    assert one.halves.estimate == pytest.approx(stats.kendalltau(first, second).statistic)
    other = np.random.default_rng(0).permutation(90)
    mixed = [
        replace(sae, interpretability_parts=(i,) * 3 + (int(other[i]),) * 3, utility_parts=())
        for i, sae in enumerate(saes)
    ]
    found = agreement(mixed, 50)
    (dealt, _) = found.reliability
    assert abs(stats.kendalltau(np.arange(90), other).statistic) < 0.15  # mutation: the first half and the second
    assert dealt.halves.estimate > 0.25
    assert found.highest == {}


def test_a_shuffled_judge_agrees_with_nothing_and_a_judge_that_is_not_shuffled_does() -> None:
    saes = simulate_saes(0.6)
    found = {(one.score, one.against): one for one in agreement(saes).shuffled}
    one = found["interpretability shuffled", "before selection"]
    assert one.tau.low < 0 < one.tau.high
    assert ("interpretability", "utility shuffled") in found
    cheating = [replace(sae, interpretability_shuffled=sae.interpretability) for sae in saes]
    result = agreement(cheating)
    assert result.shuffled[0].tau == result.of().tau
    assert result.shuffled[0].p < 0.01


def test_what_is_not_given_is_not_reported() -> None:
    found = agreement(_scores_alone(independent()), 50)
    assert found.partial == found.gains == found.reliability == found.shuffled == ()
    assert [(a.group, a.by) for a in found.agreements] == [
        ("all", "all"), ("pairs of one model", "all"), ("A", "model"), ("B", "model"), ("C", "model"),
    ]  # fmt: skip
    assert list(found.tables()) == ["agreement", "groups"]
    one = agreement([sae for sae in _scores_alone(independent()) if sae.model == "A"], 50)
    assert [a.group for a in one.agreements] == ["all"]


def test_groups_that_cannot_be_ranked_are_left_out_by_name() -> None:
    found = agreement(simulate_saes(0.3, architectures=["topk", "relu"], sparsities=[20, 40]), 50)
    assert {a.group for a in found.agreements if a.by == "architecture"} == {"topk", "relu"}
    assert not [a for a in found.agreements if a.by == "model"]
    assert "Left out: A (interpretability of 4 units: ranks need at least 5; score more of them)." in found.notes


def test_saes_without_utility_have_no_gain_and_are_counted() -> None:
    saes = simulate_saes(0.3)
    saes = [replace(sae, utility=0.0) if i < 4 else sae for i, sae in enumerate(saes)]
    found = agreement(saes, 50)
    assert found.of("all", "after added").n == 90
    assert found.of("all", "gain by added").n == 86
    assert "4 of 90 SAEs have no utility before selection, so no gain in percent." in found.notes
    assert found.gains[0].gain.n == 86


def test_equal_dead_shares_are_said_and_not_partialled_out() -> None:
    found = agreement([replace(sae, dead_share=0.0) for sae in simulate_saes(0.3)], 50)
    assert {one.given for one in found.partial} == {"explained variance"}
    assert "Nothing is given dead_share, which is 0 for all SAEs." in found.notes


def as_rows(saes: list[ScoredSAE]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in vars(sae).items() if name != "selected"} | {"selected_added": value}
        for sae in saes
        for value in sae.selected.values()
    ]


def test_a_frame_and_rows_are_the_same_saes() -> None:
    saes = simulate_saes(0.3)
    assert read_scored_saes(pd.DataFrame(as_rows(saes))) == saes
    assert read_scored_saes(as_rows(saes)) == saes
    assert agreement(as_rows(saes), 30) == agreement(saes, 30)


def test_results_are_shown_drawn_and_written() -> None:
    found = agreement(simulate_saes(0.3), 100)
    assert "before selection +0." in found.headline()
    assert list(found.tables()) == ["agreement", "groups", "given", "gain", "halves", "shuffled judge"]
    assert len(found.to_frame("groups")) == 14 * 3
    assert "Highest τ" in found.tables()["halves"].caption
    assert len(found.plot().get_yticklabels()) == 2 + 14
    assert json.loads(json.dumps(found.to_json()))["agreements"][0]["tau"]["n"] == 90
    with pytest.raises(UserError, match="agreement of 'L0 7'"):
        found.of("L0 7")


def changed(**values: Any) -> list[dict[str, Any]]:
    first, *others = as_rows(simulate_saes(0.3, models=["m"], sparsities=[50, 80]))
    return [first | values, *others]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed()[:4], "interpretability of 4 units: ranks need at least 5"),
        ([], "interpretability of 0 units: ranks need at least 5"),
        (changed(utility=math.nan), "utility of m, batchtopk, L0 50: nan is not a finite number"),
        (changed(selected_added=math.inf), "selected_added of m, batchtopk, L0 50: inf is not"),
        (changed(utility_parts=(1.0, math.nan)), "utility_parts of m, batchtopk, L0 50: nan is not"),
        (changed(utlity=1.0), "column 'utlity': a table of SAEs has .*did you mean utility"),
        (changed(utility="high"), "utility 'high': it is not a number"),
        (changed(utility=None), "utility None: it is not a number"),
        (changed(dead_share=None), "dead_share of m, batchtopk, L0 50: 1 of 10 SAEs lack it"),
        (changed(selected_other=0.3), "selected_other of m, batchtopk, L0 80: 9 of 10 SAEs lack it"),
        (changed(utility_parts=(1.0,)), "utility_parts of m, batchtopk, L0 50: a single part has no halves"),
        ([{"model": "m"}], "a table of SAEs: it has no column 'architecture'"),
        ([row | {"utility": 0.2} for row in changed()], "before selection: all 10 values are 0.2"),
    ],
)
def test_mistakes_are_named_in_one_line(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        rank_agreement(rows)
    assert "\n" not in str(error.value)
