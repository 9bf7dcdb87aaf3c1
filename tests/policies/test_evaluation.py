"""What an evaluation says of outcomes that are given: two kinds of intervals, orders of options, equal divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted_readout import Planted, readout_prompts
from rich.console import Console
from test_evaluate import QUICK, entry

from trimtab.control.answers import Answers
from trimtab.control.arm import Arm, Match
from trimtab.control.comparison_tables import gain_line
from trimtab.control.task_result import AnsweredArm, task_result
from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import EditLog, LanguageModel
from trimtab.policies.evaluate import EvaluateConfig, evaluate_trained
from trimtab.stats import bootstrap_mean, crossed_mean
from trimtab.tasks import Item, Outcome


def outcomes(rewards: Sequence[float]) -> list[Outcome]:
    return [Outcome(reward=float(r), correct=bool(r)) for r in rewards]


def arm(
    name: str, runs: Sequence[Sequence[Sequence[float]]], match: Match = "own", kl: float | None = None
) -> AnsweredArm:
    """An arm by its rewards, `[run][draw][item]`."""
    arms = [Arm(name=name, match=match, main=True, answer=lambda items, scale: []) for _ in runs]
    found = [
        [Answers(outcomes(draw), None, None if kl is None else torch.full((len(draw),), kl)) for draw in run]
        for run in runs
    ]
    return AnsweredArm(arms, found)


def test_other_trainings_have_an_interval_of_their_own() -> None:
    """Seeds inside items say how sure these policies' difference is; another training may end quite differently."""
    rng = np.random.default_rng(0)
    policy = rng.random((3, 100)) < np.array([[0.8], [0.5], [0.2]])
    control = rng.random((3, 2, 100)) < 0.5
    unsteered = rng.random(100) < 0.5
    result = task_result(
        Planted.load(),
        "test",
        [
            arm("unsteered", [[unsteered]]),
            arm("policy", [[run] for run in policy]),
            arm("random", control.tolist()),
        ],
        reference="policy",
    )
    for label, rows in (("unsteered", policy - 1.0 * unsteered), ("random", policy - control.mean(1))):
        found = result.arm(label)
        expected = crossed_mean(rows)
        assert found.difference_over_runs == expected
        assert found.difference_by_run == pytest.approx(rows.mean(1))
        assert found.difference is not None
        assert found.difference.estimate == pytest.approx(expected.estimate)
        assert expected.high - expected.low > 2 * (found.difference.high - found.difference.low)
    assert result.arm("policy").reward_over_runs == crossed_mean(policy.astype(float))
    assert result.arm("unsteered").reward_over_runs is None
    assert result.gain.over_runs == result.arm("unsteered").difference_over_runs
    assert "Over trainings, too" in gain_line(result)
    alone = task_result(
        Planted.load(), "test", [arm("unsteered", [[unsteered]]), arm("policy", [[policy[0]]])], reference="policy"
    )
    assert alone.arm("unsteered").difference_over_runs is None
    assert "Over trainings" not in gain_line(alone)


def test_a_divergence_that_is_equal_on_validation_alone_is_marked() -> None:
    rewards = [[[0.0, 1.0, 1.0]]]
    arms = [
        arm("unsteered", rewards),
        arm("policy", rewards, kl=0.5),
        arm("random", rewards, "kl", 0.54),
        arm("static", rewards, "kl", 0.58),
        arm("vector", rewards, "own", 3.0),
    ]
    result = task_result(Planted.load(), "test", arms, reference="policy")
    assert [one.equal_kl for one in result.arms] == [None, None, True, False, None]


def edited(dose: float, n: int) -> Answers:
    """Answers to three items, n of them edited."""
    log = EditLog.empty()
    ones, rows = torch.ones(n), torch.arange(n)
    log = replace(
        log, site=0 * rows, row=rows, position=0 * rows, feature=rows[:, None], coefficient=ones[:, None],
        requested=ones[:, None], x_norm=ones, delta_norm=dose * ones, action_logp=ones, n_allowed=rows, value=ones,
        target=ones[:, None] * torch.nan, replaced=0 * rows,
    )  # fmt: skip
    return Answers(outcomes([1.0, 0.0, 1.0]), SimpleNamespace(edits=log))  # pyright: ignore[reportArgumentType]


def test_doses_are_equal_only_if_they_are_in_every_training() -> None:
    """Two trainings; their mean dose and their edits are pooled by their numbers."""
    runs = [[edited(0.5, 3)], [edited(0.8, 1)]]

    def one(name: str, runs: list[list[Answers]], match: Match = "own") -> AnsweredArm:
        return AnsweredArm([Arm(name=name, match=match, answer=lambda items, scale: []) for _ in runs], runs)

    arms = [
        one("unsteered", [[Answers(outcomes([0.0, 1.0, 1.0]))]]),
        one("policy", runs),
        one("same", [[edited(0.502, 3)], [edited(0.8, 1)]], "dose"),
        one("stronger", [[edited(0.5, 3)], [edited(0.81, 1)]], "dose"),
        one("oftener", [[edited(0.5, 3)], [edited(0.8, 2)]], "dose"),
        one("drawn", [[edited(0.5, 3)] * 2, [edited(0.8, 1), edited(0.7, 1)]], "dose"),
    ]
    result = task_result(Planted.load(), "test", arms, reference="policy")
    found = {arm.label.removesuffix(" at equal dose"): arm for arm in result.arms}
    assert [found[name].equal_dose for name in found] == [None, None, True, False, False, False]
    assert found["stronger"].dose_note == "relative is 0.8 for the policy and 0.81 for stronger"
    assert found["oftener"].dose_note == "n_edits is 1 for the policy and 2 for oftener"
    dose = found["policy"].dose
    assert dose is not None
    assert (dose.n_edits, dose.relative) == (4, pytest.approx((3 * 0.5 + 0.8) / 4))
    assert (dose.relative_min, dose.relative_max) == (pytest.approx(0.5), pytest.approx(0.8))


def test_what_is_known_is_right_in_the_first_order_too_and_compared_with_the_reference() -> None:
    """Half of the items are right in both orders under the policy, a quarter without it."""
    first = {"unsteered": [1, 1, 1, 0], "policy": [1, 1, 0, 1]}
    second = {"unsteered": [1, 0, 0, 1], "policy": [1, 1, 1, 0]}
    answered, other = ([arm(name, [[rewards]]) for name, rewards in order.items()] for order in (first, second))
    result = task_result(TwoOrders.load(), "test", answered, reference="policy", other_orders=[other])
    known = [result.arm(name).known for name in first]
    assert [None if interval is None else interval.estimate for interval in known] == [0.25, 0.5]
    difference = result.arm("unsteered").known_difference
    assert difference is not None
    assert difference.estimate == 0.25


def test_accuracy_is_of_judged_answers_and_of_well_formed_ones() -> None:
    """A malformed answer that counts as right does not count among the well formed; one without a verdict, nowhere."""
    made = [
        Outcome(reward=1.0, correct=True, malformed=True),
        Outcome(reward=1.0, correct=True),
        Outcome(reward=0.0, correct=False),
    ]
    whole = AnsweredArm([Arm(name="unsteered", answer=lambda items, scale: [])], [[Answers(made)]])
    (found,) = task_result(Planted.load(), "test", [whole], reference="unsteered").arms
    assert found.accuracy is not None
    assert found.accuracy_well_formed is not None
    assert (found.accuracy.estimate, found.accuracy_well_formed.estimate) == (pytest.approx(2 / 3), 0.5)
    partly = whole._replace(runs=[[Answers([*made[:2], Outcome(reward=0.0, correct=None)])]])
    (found,) = task_result(Planted.load(), "test", [partly], reference="unsteered").arms
    assert found.accuracy is None


class Shown(Planted):
    name = "shown"
    shown_metrics = ("accuracy", "not-there")


def test_the_tasks_own_metrics_have_intervals_over_items() -> None:
    rng = np.random.default_rng(1)
    policy, unsteered = rng.random((2, 80)) < 0.6, rng.random(80) < 0.5
    arms = [arm("unsteered", [[unsteered]]), arm("policy", [[run] for run in policy])]
    result = task_result(Shown.load(), "test", arms, reference="policy")
    (accuracy,) = result.arm("policy").metric_intervals.values()
    expected = bootstrap_mean(policy.astype(float))
    assert accuracy.estimate == pytest.approx(expected.estimate)
    assert (accuracy.low, accuracy.high) == (
        pytest.approx(expected.low, abs=0.02),
        pytest.approx(expected.high, abs=0.02),
    )


class TwoOrders(Planted):
    """Which letter is right depends on the order that the options are shown in, which the model does not see."""

    name = "two-orders"

    def orders(self, item: Item) -> int:
        return 2

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        right = item.answer if permutation == 0 else "N"
        return Outcome(reward=float(text[:1] == right), correct=text[:1] == right, answer=text[:1])


def test_who_names_the_same_letter_under_every_order_knows_nothing(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path: Path
) -> None:
    """The policy always says Y, which is right in the first order and wrong in the second."""
    made = entry(tmp_path / "run", planted, planted_dictionary, TwoOrders.load(), 0)
    settings = {"control": ("random",), "equal_kl": False, "trace": False}
    evaluation = evaluate_trained([made], EvaluateConfig(policy=(tmp_path,), **(QUICK | settings)))  # pyright: ignore
    policy, unsteered = evaluation.result.arm("policy"), evaluation.result.arm("unsteered")
    assert policy.reward.estimate == 1
    assert policy.known is not None
    assert policy.known.estimate == 0
    assert unsteered.known is not None
    assert unsteered.known.estimate == 0
    assert unsteered.known_difference is not None
    assert evaluation.result.arm("random at equal dose").known is None
    screen = Console(width=200, record=True, no_color=True)
    screen.print(evaluation.render())
    assert "known: right under every cyclic" in screen.export_text()
    off = evaluate_trained([made], EvaluateConfig(policy=(tmp_path,), every_order=False, **(QUICK | settings)))  # pyright: ignore
    assert off.result.arm("policy").known is None


def test_items_of_unequal_numbers_of_orders_are_asked_in_one(planted: LanguageModel) -> None:
    class Mixed(TwoOrders):
        def orders(self, item: Item) -> int:
            return 2 + (item.group == "/")

    for task, orders in ((TwoOrders, 1), (Mixed, 0)):
        prompts = readout_prompts(planted, task, "test")
        assert len(prompts.other_orders(planted)) == orders


def test_an_order_reaches_prompts_and_answers(planted: LanguageModel, planted_dictionary: Standard) -> None:
    from trimtab.control.task_prompts import TaskPrompts

    class Said(TwoOrders):
        def prompt(self, item: Item, permutation: int = 0) -> str:
            return f"{super().prompt(item, permutation)}{permutation}"

    task = Said.load()
    items = task.items("test")[:3]
    first, second = (TaskPrompts.of(planted, task, items, options_only=True, permutation=k) for k in (0, 1))
    assert [planted.decode_ids(list(p))[-1] for p in (first.ids[0], second.ids[0])] == ["0", "1"]
    assert second.take([1]).permutation == 1


def test_items_that_were_looked_at_can_be_left_out(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path: Path
) -> None:
    own = "planted_readout:Planted"  # called otherwise than its name
    one = entry(tmp_path / "one", planted, planted_dictionary, Planted.load(), 0, task=own)
    other = entry(tmp_path / "other", planted, planted_dictionary, Planted.load(), 0, task=own, dose=1.5)
    settings = {"control": ("random",), "equal_kl": False, "trace": False, "items": 10}

    def run(made: object, **more: object) -> tuple[str, ...]:
        config = EvaluateConfig(policy=(tmp_path,), **(QUICK | settings | more))  # pyright: ignore
        return evaluate_trained([made], config).warnings  # pyright: ignore

    assert not any("before" in warning for warning in run(one))
    assert any("runs beside these looked at the same test items before (one)" in w for w in run(other))
    assert not any("before" in warning for warning in run(other, skip=10))
    assert any("was opened before (1× in other)" in warning for warning in run(other, skip=15))
    openings = [o["split"] for o in other.run.record_dict["test_split_openings"]]
    assert openings == ["test[:10]", "test[10:20]", "test[15:25]"]
    assert other.run.record_dict["splits"]["test[10:20]"] == [i.id for i in Planted.load().sample("test", 20)[10:]]
    with pytest.raises(UserError, match="skip 62: the split test has 62 items"):
        run(other, skip=62)
