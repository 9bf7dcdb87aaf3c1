"""The critic's report on planted values, and on policies whose limits are known."""

from __future__ import annotations

from math import comb
from typing import Any

import numpy as np
import pytest
import torch
from planted_readout import HalfHurt, Planted, planted_sae
from readout_setups import readout_setup
from sklearn.metrics import roc_auc_score

from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel
from trimtab.policies.analyses import critic as module
from trimtab.policies.analyses.critic import (
    MEAN,
    CriticReport,
    Helped,
    critic_report,
    cross_fitted_probe,
    helped_by_headroom,
    judge_critic,
)
from trimtab.policies.analyses.diagnosis import diagnose
from trimtab.policies.analyses.policy_rollouts import PolicyRollouts
from trimtab.policies.headroom.table import HeadroomTable
from trimtab.policies.headroom.trials import own_headroom
from trimtab.policies.networks import Policy
from trimtab.stats import Interval, wilson_interval

ITEMS, STEPS, WIDTH = 200, 3, 6


class Planted2:
    """Items of which half are wrong unsteered; whether the policy corrects one is written in coordinate 1 of x."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.before = np.arange(ITEMS) % 2 == 0
        self.after = rng.random(ITEMS) < 0.5
        self.x = rng.normal(size=(ITEMS, STEPS, WIDTH))
        self.x[:, :, 0] += 4.0 * self.before[:, None]  # how hard the prompt is
        self.x[:, :, 1] += 3.0 * self.after[:, None]
        self.valid = np.ones((ITEMS, STEPS), dtype=bool)

    def report(self, value: np.ndarray, helped: Interval | None = None) -> CriticReport:
        return critic_report(
            value, self.x, self.valid, before=self.before, after=self.after, helped=Helped(helped, None, "given"),
            n_resamples=300,
        )  # fmt: skip

    def wrong(self, report: CriticReport) -> str:
        return next(v for v in report.verdicts if v.group == "unsteered wrong").label


def test_a_critic_that_knows_where_no_action_helps_is_limited_by_the_policy() -> None:
    planted = Planted2()
    value = 0.2 * planted.x[:, :, 1] + 0.1
    none, most, half = (wilson_interval(k, 20) for k in (0, 19, 10))
    assert planted.wrong(planted.report(value, none)) == "policy_limited"
    assert planted.wrong(planted.report(value, most)) == "improvable"
    assert planted.wrong(planted.report(value, half)) == "undecided"
    assert planted.wrong(planted.report(value)) == "undecided"


def test_actions_that_were_not_tried_may_help() -> None:
    """A policy is not called limited by a lower bound, neither where the critic knows nor where it is not tested."""
    knows = wilson_interval(48, 60)
    for critic, label in ((knows, "undecided"), (None, "critic_untested")):
        found = diagnose(
            "unsteered wrong", critic=critic, probe=None, difference=None, helped=wilson_interval(0, 24),
            lower_bound=True,
        )  # fmt: skip
        assert found.label == label
        assert "the actions tried do not help most of those that end wrong, and others were not tried" in found.reason
        assert found.helped_is_lower_bound
    helps = diagnose(
        "unsteered wrong", critic=knows, probe=None, difference=None, helped=wilson_interval(23, 24), lower_bound=True
    )
    assert helps.label == "improvable"


def test_a_lower_bound_is_one_for_wrong_answers_alone() -> None:
    """What is right unsteered is kept by no edit: that is known, whichever actions were tried."""
    planted = Planted2()
    value = 0.2 * planted.x[:, :, 1] + 0.1
    report = critic_report(
        value, planted.x, planted.valid, before=planted.before, after=planted.after, n_resamples=300,
        helped=Helped(wilson_interval(0, 20), None, "some", lower_bound=True),
    )  # fmt: skip
    assert planted.wrong(report) == "undecided"
    labels = {v.group: (v.label, v.helped_is_lower_bound) for v in report.verdicts}
    assert labels == {"unsteered wrong": ("undecided", True), "unsteered right": ("improvable", False)}


def test_a_critic_that_reads_how_hard_a_prompt_is_is_in_error() -> None:
    """Its value tells right from wrong over all items, and nothing among those that are alike unsteered."""
    planted = Planted2()
    planted.after = np.where(np.random.default_rng(5).random(ITEMS) < 0.2, ~planted.before, planted.before)
    planted.x[:, :, 1] = np.random.default_rng(1).normal(size=(ITEMS, STEPS)) + 3 * planted.after[:, None]
    value = 0.2 * planted.x[:, :, 0]
    assert roc_auc_score(planted.after, value.mean(1)) > 0.75
    report = planted.report(value, wilson_interval(0, 20))
    assert [v.label for v in report.verdicts] == ["critic_error", "critic_error"]
    for v in report.verdicts:
        assert v.critic is not None
        assert v.critic.low < 0.5 < v.critic.high
        assert v.difference is not None
        assert v.difference.low > 0


def test_nothing_is_decided_where_nothing_tells_the_outcome() -> None:
    planted = Planted2()
    rng = np.random.default_rng(9)
    planted.after = rng.random(ITEMS) < 0.5
    planted.x = rng.normal(size=planted.x.shape)
    report = planted.report(rng.normal(size=(ITEMS, STEPS)), wilson_interval(0, 20))
    assert [v.label for v in report.verdicts] == ["undecided", "undecided"]


def test_curves_are_numpys_means_by_group() -> None:
    planted = Planted2()
    planted.valid[::3, 2] = False
    value = np.random.default_rng(3).normal(size=(ITEMS, STEPS))
    report = planted.report(value)
    masks = {
        "correct": planted.before & planted.after,
        "corrected": ~planted.before & planted.after,
        "misguided": planted.before & ~planted.after,
        "incorrect": ~planted.before & ~planted.after,
    }
    assert report.counts == {name: int(mask.sum()) for name, mask in masks.items()}
    assert len(report.curve) == 4 * STEPS
    for point in report.curve:
        mine = value[masks[point.group] & planted.valid[:, point.step], point.step]
        assert (point.n, point.mean, point.sd) == (
            len(mine), pytest.approx(np.mean(mine)), pytest.approx(np.std(mine, ddof=1)),
        )  # fmt: skip


@pytest.mark.parametrize("ties", [False, True])
def test_separations_are_sklearns_auc_among_items_alike_unsteered(ties: bool) -> None:
    planted = Planted2()
    planted.valid[::3, 2] = False
    value = np.random.default_rng(3).normal(size=(ITEMS, STEPS)) + planted.after[:, None]
    value = value.round() if ties else value
    for one in planted.report(value).separations:
        if ties and one.step == MEAN:
            continue  # means over steps tie only up to rounding
        members = planted.before if one.group == "unsteered right" else ~planted.before
        if one.step == MEAN:
            score = np.array([v[ok].mean() for v, ok in zip(value, planted.valid, strict=True)])
        else:
            members, score = members & planted.valid[:, one.step], value[:, one.step]
        assert one.critic is not None
        assert one.critic.estimate == pytest.approx(roc_auc_score(planted.after[members], score[members]))
        assert one.critic.low < one.critic.estimate < one.critic.high
        assert one.critic.n == one.n == int(members.sum())


def test_the_probe_does_not_see_the_items_it_scores() -> None:
    """More dimensions than items and labels that are noise: a probe that saw them would be near 1."""
    rng = np.random.default_rng(2)
    scores = []
    for _ in range(6):
        x, label = rng.normal(size=(80, 200)), rng.random(80) < 0.5
        found = cross_fitted_probe(x, label)
        assert found is not None
        scores.append(roc_auc_score(label, found))
    assert 0.35 < np.mean(scores) < 0.65
    assert cross_fitted_probe(x, np.arange(80) < 4) is None


def test_one_kind_of_outcome_tests_no_critic() -> None:
    none = diagnose("unsteered wrong", critic=None, probe=None, difference=None, helped=wilson_interval(0, 24))
    assert none.label == "critic_untested"
    assert none.reason.endswith("no action helps most of those that end wrong")
    assert "not tested" in none.reason
    few = diagnose("unsteered wrong", critic=None, probe=None, difference=None, helped=wilson_interval(0, 1))
    assert few.label == "critic_untested"
    assert few.reason.endswith("not clear of a half")


def play_of(model: LanguageModel, sae: Standard, task: type[Planted], **settings: object) -> PolicyRollouts:
    """A policy that always does nothing."""
    setup = readout_setup(model, sae, task, **settings)
    policy = Policy.build(sae.directions, hidden=(8,), seed=0)
    with torch.no_grad():
        policy.actor.head.bias[-1] = 1e4  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    return PolicyRollouts.of(setup, policy, setup.prompts("train", 60))


def test_the_headroom_says_whether_an_action_helps(planted: LanguageModel, planted_dictionary: Standard) -> None:
    """One feature of the dictionary makes every answer right; without it nothing does."""
    rollouts = play_of(planted, planted_dictionary, Planted)
    wrong = sum(o.correct is False for o in rollouts.outcomes)
    helped = helped_by_headroom(rollouts, items=1000)
    assert helped.share is not None
    assert (helped.share.estimate, helped.share.n) == (1.0, wrong)
    assert not helped.lower_bound
    blunt = planted_sae(planted)
    with torch.no_grad():
        blunt.W_dec[:2] = blunt.W_dec[2:4]
    rollouts = play_of(planted, blunt, Planted)
    helped = helped_by_headroom(rollouts, items=1000)
    assert helped.share is not None
    assert helped.share.estimate == 0
    report = judge_critic(rollouts, helped)
    assert report.counts["corrected"] == report.counts["misguided"] == 0
    assert [v.label for v in report.verdicts if v.group == "unsteered wrong"] == ["critic_untested"]


def test_some_features_are_held_over_longer_answers(planted: LanguageModel, planted_dictionary: Standard) -> None:
    """The one that makes answers begin with Y is among all 32, and it is not the first that a draw tries."""
    rollouts = play_of(planted, planted_dictionary, Planted, options_only=False, max_new_tokens=3)
    wrong = min(8, sum(o.correct is False for o in rollouts.outcomes))
    helped = helped_by_headroom(rollouts, items=8, features=32)
    assert helped.share is not None
    assert (helped.share.estimate, helped.share.n) == (1.0, wrong)
    assert "32 features (random), each held over the whole answer" in helped.how
    assert helped.lower_bound
    first = helped_by_headroom(rollouts, items=8, features=1)
    assert first.share is not None
    assert first.share.estimate == 0


def test_random_directions_are_as_many_as_the_mask_allows_features(
    planted: LanguageModel, planted_dictionary: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 32 directions k help an item whose mask allows m features: m of them miss all k in C(32−k, m) of C(32, m)."""
    rollouts = play_of(planted, planted_dictionary, Planted)
    rng, expected, any_of_all = np.random.default_rng(4), [], []

    def table(*args: Any, **options: Any) -> HeadroomTable:
        found = own_headroom(*args, **options)
        items, n = found.reward.shape
        m, k = np.arange(items) % 5, np.arange(items) % 4
        expected[:] = [1 - comb(n - y, x) / comb(n, x) for x, y in zip(m.tolist(), k.tolist(), strict=True)]
        any_of_all[:] = k > 0
        allowed, random = (rng.random((items, n)).argsort(1) < count[:, None] for count in (m, k))
        return found._replace(allowed=allowed, random=random.astype(np.float32))

    monkeypatch.setattr(module, "own_headroom", table)
    helped = helped_by_headroom(rollouts, items=1000)
    assert helped.random is not None
    assert helped.random.estimate == pytest.approx(np.mean(expected))
    assert helped.random.estimate < 0.3 < np.mean(any_of_all)
    assert 0 < helped.random.low < helped.random.estimate < helped.random.high < 0.5


def test_random_directions_that_all_help_are_counted_whole(
    planted: LanguageModel, planted_dictionary: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 7 of 100, the shares of all choices add up to a little more than 1 in floating point."""
    rollouts = play_of(planted, planted_dictionary, Planted)

    def table(*args: Any, **options: Any) -> HeadroomTable:
        found = own_headroom(*args, **options)
        allowed = np.broadcast_to(np.arange(found.reward.shape[1]) < 7, found.reward.shape)
        return found._replace(random=np.ones((len(allowed), 100), np.float32), allowed=allowed)

    monkeypatch.setattr(module, "own_headroom", table)
    helped = helped_by_headroom(rollouts, items=1000)
    assert helped.random is not None
    assert helped.random.estimate == pytest.approx(1)


def test_no_wrong_answers_need_no_headroom(planted: LanguageModel, planted_dictionary: Standard) -> None:
    class Always(HalfHurt):
        def parse(self, item, text, permutation=0):
            outcome = super().parse(item, text, permutation)
            return type(outcome)(reward=1.0, correct=True)

    helped = helped_by_headroom(play_of(planted, planted_dictionary, Always))
    assert helped.share is None
    assert "no answer is wrong" in helped.how
