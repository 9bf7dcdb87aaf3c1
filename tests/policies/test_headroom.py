"""Headroom's lines in closed form, and its table against decoding one feature at a time."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from first_letter import FirstLetter
from policy_rollouts import SITE, setting

from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.policies.headroom import lines as module
from trimtab.policies.headroom import table as measuring
from trimtab.policies.headroom.candidates import TriedFeatures
from trimtab.policies.headroom.lines import cross_fit, headroom
from trimtab.policies.headroom.table import HeadroomTable, headroom_table
from trimtab.policies.headroom.trials import Trials
from trimtab.policies.rollout import roll_out
from trimtab.selection.scorer import LastTokenScorer
from trimtab.stats import best_of_some
from trimtab.steering import StaticSource

ABOUT = {"site": "resid_post.1", "dose": 1.0, "unit": "relative", "mask": "none"}


def table(reward: np.ndarray, **parts: np.ndarray) -> HeadroomTable:
    items, n = reward.shape
    zeros = np.zeros((items, n), dtype=np.float32)
    values = {"random": zeros, "unsteered": np.zeros(items), "x": np.zeros((items, 4)), "strength": zeros}
    values["allowed"] = np.ones((items, n), dtype=bool)
    return HeadroomTable(reward=reward.astype(np.float32), candidates=TriedFeatures.all(n), **(values | parts))


def two_contexts(items: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Feature 2 solves one half of the items and feature 5 the other; the activation says which half."""
    kind = np.arange(items) % 2
    reward = np.zeros((items, 8))
    reward[kind == 0, 2] = reward[kind == 1, 5] = 1
    x = np.random.default_rng(0).normal(size=(items, 4))
    x[:, 1] += np.where(kind, 4, -4)
    return reward, x


def test_two_contexts_need_a_policy() -> None:
    reward, x = two_contexts()
    lines = headroom(table(reward, x=x), **ABOUT)  # pyright: ignore[reportArgumentType]
    assert lines.unsteered.estimate == 0
    assert lines.ceiling.estimate == 1
    assert 0.3 < lines.static.estimate < 0.55  # below 1/2: what is best elsewhere is worse here
    assert lines.readout.estimate > 0.95
    assert lines.over_static > 0.4
    assert lines.warnings() == ()


def test_a_readout_of_noise_gains_nothing_over_the_static_feature() -> None:
    reward, x = two_contexts()
    noise = np.random.default_rng(1).normal(size=x.shape)
    lines = headroom(table(reward, x=noise), **ABOUT)  # pyright: ignore[reportArgumentType]
    assert lines.readout.estimate < 0.65


def test_one_feature_for_all_leaves_nothing_to_learn() -> None:
    reward = np.zeros((30, 6))
    reward[:, 3] = 1
    lines = headroom(table(reward), **ABOUT)  # pyright: ignore[reportArgumentType]
    assert lines.static.estimate == lines.ceiling.estimate == 1
    assert lines.warnings() == ("nothing to learn: the best static feature reaches the ceiling",)


def test_nothing_to_gain_is_said() -> None:
    right = headroom(table(np.ones((9, 3)), unsteered=np.ones(9)), **ABOUT)  # pyright: ignore[reportArgumentType]
    assert right.warnings() == ("no headroom: the unsteered model already gets every item right",)
    stuck = headroom(table(np.zeros((9, 3))), **ABOUT)  # pyright: ignore[reportArgumentType]
    assert stuck.warnings() == ("no headroom: no feature at this dose makes any wrong item right",)


def test_features_of_one_item_do_not_pass_for_a_static_feature() -> None:
    """Each item is solved by a feature of its own: chosen on the same items one would seem to help."""
    lines = headroom(table(np.eye(40)), **ABOUT)  # pyright: ignore[reportArgumentType]
    assert lines.ceiling.estimate == 1
    assert lines.static.estimate == 0


def test_two_items_are_enough() -> None:
    lines = headroom(table(np.array([[0.0, 1.0], [0.0, 1.0]])), **ABOUT)  # pyright: ignore[reportArgumentType]
    assert lines.static.estimate == lines.readout.estimate == 1


def test_masks_limit_every_line() -> None:
    reward, x = two_contexts()
    allowed = np.ones(reward.shape, dtype=bool)
    allowed[:, 5] = False
    strength = np.zeros(reward.shape)
    strength[:, 5], strength[:, 2] = 2, 1
    lines = headroom(table(reward, x=x, allowed=allowed, strength=strength), **ABOUT)  # pyright: ignore[reportArgumentType]
    assert lines.ceiling.estimate == lines.most_active.estimate == 0.5
    assert lines.readout.estimate <= 0.5


def check_ceilings_of_chance() -> None:
    """Features that help no oftener than random directions: under any mask, their ceiling is the random one.

    A mask of m features makes 1 − 0.95^m of the items right, one that allows nothing none.
    """
    rng = np.random.default_rng(2)
    items, n = 600, 60
    allowed = rng.random((items, n)).argsort(1) < rng.integers(0, 9, items)[:, None]
    m = allowed.sum(1)
    helps, random = rng.random((2, items, n)) < 0.05
    lines = headroom(table(helps, random=random.astype(np.float32), allowed=allowed), **ABOUT)  # pyright: ignore[reportArgumentType]
    expected = (1 - 0.95**m).mean()
    for found in (lines.ceiling, lines.random_ceiling):
        assert found.estimate == pytest.approx(expected, abs=0.05)
    assert lines.random_per_item == lines.allowed_per_item == m.mean()


def test_the_random_ceiling_is_over_as_many_directions_as_the_mask_allows_features() -> None:
    check_ceilings_of_chance()


def every_random_direction_counts(patch: pytest.MonkeyPatch) -> None:
    """Mutation: as many random directions as features tried, whatever the mask allows."""
    patch.setattr(module, "best_of_some", lambda values, counts: values.max(1))


def test_a_random_ceiling_that_the_mask_does_not_limit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    every_random_direction_counts(monkeypatch)
    with pytest.raises(AssertionError):
        check_ceilings_of_chance()


def test_the_best_of_some_is_the_mean_over_all_choices() -> None:
    values = np.random.default_rng(3).normal(size=(7, 6)).round(1)
    counts = np.arange(7)
    expected = [0.0] + [np.mean([max(chosen) for chosen in itertools.combinations(values[m], m)]) for m in range(1, 7)]
    assert best_of_some(values, counts).tolist() == pytest.approx(expected, abs=1e-12)


def test_where_fewer_random_directions_were_tried_it_is_said() -> None:
    reward, x = two_contexts()
    lines = headroom(table(reward, x=x, random=np.ones((60, 3), np.float32)), **ABOUT)  # pyright: ignore[reportArgumentType]
    assert (lines.random_per_item, lines.allowed_per_item, lines.random_ceiling.estimate) == (3, 8, 1)


def test_cross_fitting_never_shows_an_item_to_its_own_choice() -> None:
    def check(fit: np.ndarray, test: np.ndarray) -> np.ndarray:
        assert not set(fit) & set(test)
        assert len(fit) + len(test) == 17
        return test.astype(float)

    assert cross_fit(17, check, seed=3).tolist() == list(range(17))


@pytest.mark.parametrize("options_only", [False, True])
def test_the_table_is_what_decoding_with_each_feature_gives(
    tiny_llama: LanguageModel, sae: Standard, options_only: bool
) -> None:
    task = FirstLetter.load()
    prompts = TaskPrompts.of(tiny_llama, task, task.items("train")[:6], options_only=options_only)
    ground = setting(tiny_llama, sae, dose=2.0, mask="current")
    found = Trials.of(ground, prompts).tables()["current"]
    assert found.unsteered.tolist() == [o.reward for o in roll_out(tiny_llama, None, prompts).outcomes]
    disagreements = 0
    for feature in range(0, 64, 7):
        source = StaticSource(sae, feature, 2.0, SITE)
        rewards = [o.reward for o in roll_out(tiny_llama, source, prompts).outcomes]
        disagreements += int((found.reward[:, feature] != rewards).sum())
    assert disagreements == 0
    codes = sae.encode(torch.from_numpy(found.x))
    assert np.array_equal(found.allowed, (codes > 0).numpy())
    if options_only:
        assert 0 < found.reward.mean() < 1


def test_answers_of_several_tokens_are_refused(tiny_llama: LanguageModel, sae: Standard) -> None:
    task = FirstLetter.load()
    prompts = TaskPrompts.of(tiny_llama, task, task.items("train")[:2], max_new_tokens=3)
    with pytest.raises(UserError, match="headroom of first-letter: its answers take up to 3 tokens"):
        headroom_table(setting(tiny_llama, sae), prompts)


def test_progress_is_told_in_parts_of_an_item(
    tiny_llama: LanguageModel, sae: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever tries features on a few items must not wait for a whole one to learn how long it takes."""
    task = FirstLetter.load()
    prompts = TaskPrompts.of(tiny_llama, task, task.items("train")[:3])
    told: list[float] = []
    monkeypatch.setattr(measuring, "LastTokenScorer", partial(LastTokenScorer, batch_size=16))
    headroom_table(setting(tiny_llama, sae), prompts, progress=told.append)
    assert told == [1 / 8] * 24  # 64 features and 64 random directions, 16 at a time
