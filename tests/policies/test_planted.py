"""Planted truths are found; and with each of some plausible mistakes, the check that guards against it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from planted_choice import LENGTH
from planted_rollout import check_divergence_costs_reward, check_reward_is_at_the_end
from planted_truths import (
    BlindCritic,
    Bottleneck,
    check_a_mask_is_kept,
    check_blind_critic,
    check_branch_point,
    check_delayed_reward,
    check_one_in_a_thousand,
    check_seeing_critic,
    check_two_contexts,
)

from trimtab.dictionaries import Standard
from trimtab.lm import EditRequest, LanguageModel
from trimtab.policies import ppo, rollout, source, train
from trimtab.policies.analyses import branch_points, critic, forks
from trimtab.policies.networks import ObservationNormaliser, Policy
from trimtab.policies.rollout import Rollouts
from trimtab.policies.setup import Setup
from trimtab.policies.source import PolicySource

Patch = pytest.MonkeyPatch
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def seeing(planted: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Bottleneck:
    return Bottleneck.trained(planted, tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def blind(planted: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Bottleneck:
    return Bottleneck.trained(planted, tmp_path_factory.mktemp("blind"), BlindCritic)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_one_rewarded_feature_among_a_thousand_is_found(planted: LanguageModel, tmp_path: Path, seed: int) -> None:
    check_one_in_a_thousand(planted, tmp_path / "run", seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_features_are_learnt_where_no_single_one_serves(planted: LanguageModel, tmp_path: Path, seed: int) -> None:
    check_two_contexts(planted, tmp_path / "run", seed)


def test_nothing_is_learnt_behind_a_mask_that_forbids_it(planted: LanguageModel, tmp_path: Path) -> None:
    check_a_mask_is_kept(planted, tmp_path / "run")


def test_the_one_decisive_token_is_a_branch_point_and_no_other(
    choice: LanguageModel, choice_dictionary: Standard
) -> None:
    check_branch_point(choice, choice_dictionary)


def test_a_critic_that_learnt_where_no_action_helps_blames_the_actions(seeing: Bottleneck) -> None:
    check_seeing_critic(seeing)


def test_a_critic_that_learnt_without_seeing_is_in_error(blind: Bottleneck) -> None:
    check_blind_critic(blind)


def test_what_a_later_token_brings_is_learnt_at_little_divergence(
    choice: LanguageModel, choice_dictionary: Standard, tmp_path: Path
) -> None:
    check_delayed_reward(choice, choice_dictionary, tmp_path / "run")


class Case(NamedTuple):
    """What a check needs."""

    given: Callable[[str], Any]
    """A fixture by its name."""
    run: Path


class Mutation(NamedTuple):
    """A plausible mistake, and the check that must notice it."""

    apply: Callable[[Patch], None]
    check: Callable[[Case], None]
    trained: tuple[str, ...] = ()
    """Fixtures that are made without the mistake."""


def reward_the_row_before(patch: Patch) -> None:
    original = train.roll_out

    def roll_out(*args: Any, **options: Any) -> Rollouts:
        found = original(*args, **options)
        return found._replace(reward=found.reward.roll(-1, 0))

    patch.setattr(train, "roll_out", roll_out)


def change_rollouts(patch: Patch, change: Callable[[Rollouts, float], torch.Tensor]) -> None:
    """Rollouts, of trainings as well, have another reward; it follows from what they are and from the penalty."""
    original = rollout.roll_out

    def roll_out(*args: Any, **options: Any) -> Rollouts:
        found = original(*args, **options)
        return found._replace(reward=change(found, options.get("kl_penalty", 0.0)))

    patch.setattr(rollout, "roll_out", roll_out)
    patch.setattr(train, "roll_out", roll_out)


def reward_the_first_decision(patch: Patch) -> None:
    def change(found: Rollouts, penalty: float) -> torch.Tensor:
        reward, row = found.reward.clone(), torch.arange(len(found.outcomes))
        earned = torch.tensor([outcome.reward for outcome in found.outcomes])
        reward[row, torch.tensor([len(ids) - 1 for ids in found.decoded.token_ids])] -= earned
        reward[:, 0] += earned
        return reward

    change_rollouts(patch, change)


def reward_behind_the_end(patch: Patch) -> None:
    """The last place of the table instead of a row's own last decision."""

    def change(found: Rollouts, penalty: float) -> torch.Tensor:
        reward, row = found.reward.clone(), torch.arange(len(found.outcomes))
        earned = torch.tensor([outcome.reward for outcome in found.outcomes])
        reward[row, torch.tensor([len(ids) - 1 for ids in found.decoded.token_ids])] -= earned
        reward[:, -1] += earned
        return reward

    change_rollouts(patch, change)


def reward_divergence(patch: Patch) -> None:
    """The penalty's sign is wrong."""

    def change(found: Rollouts, penalty: float) -> torch.Tensor:
        return found.reward if found.kl is None else found.reward + 2 * penalty * found.kl

    change_rollouts(patch, change)


def penalise_at_the_end(patch: Patch) -> None:
    """All of a row's divergence is paid for at its last decision."""

    def change(found: Rollouts, penalty: float) -> torch.Tensor:
        if found.kl is None:
            return found.reward
        reward, row = found.reward + penalty * found.kl, torch.arange(len(found.outcomes))
        reward[row, torch.tensor([len(ids) - 1 for ids in found.decoded.token_ids])] -= penalty * found.kl.sum(1)
        return reward

    change_rollouts(patch, change)


def never_explore(patch: Patch) -> None:
    original = Setup.source

    def source(self: Setup, policy: Policy, **options: Any) -> PolicySource:
        return original(self, policy, **(options | {"greedy": True}))

    patch.setattr(Setup, "source", source)


def share_draws_between_copies(patch: Patch) -> None:
    """All copies of an item draw the same action."""
    original = EditRequest.uniform

    def uniform(self: EditRequest, stream: int, **options: Any) -> torch.Tensor:
        return original(self._replace(branch=torch.zeros_like(self.branch)), stream, **options)

    patch.setattr(EditRequest, "uniform", uniform)


def turn_advantages_around(patch: Patch) -> None:
    original = ppo.returns

    def returns(*args: Any, **options: Any) -> ppo.Returns:
        found = original(*args, **options)
        return found._replace(advantage=-found.advantage)

    patch.setattr(ppo, "returns", returns)


def shuffle_the_critics_targets(patch: Patch) -> None:
    original = ppo.returns

    def returns(*args: Any, **options: Any) -> ppo.Returns:
        found = original(*args, **options)
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
        return found._replace(target=found.target[order])

    patch.setattr(ppo, "returns", returns)


def observe_nothing(patch: Patch) -> None:
    patch.setattr(ObservationNormaliser, "forward", lambda self, x: torch.zeros_like(x, dtype=torch.float32))


def learn_from_other_observations(patch: Patch) -> None:
    """Observations reach the update in another order than actions."""
    original = ppo._clipped_loss

    def clipped_loss(*args: Any) -> Any:
        loss = original(*args)
        return lambda batch: loss(batch.set("observation", batch["observation"].roll(1, 0)))

    patch.setattr(ppo, "_clipped_loss", clipped_loss)


def ignore_the_mask(patch: Patch) -> None:
    """Both in rollouts and in updates, so that their log-probabilities agree."""
    patch.setattr(source, "with_no_edit", lambda allowed: allowed.new_ones(len(allowed), allowed.shape[1] + 1))


def fork_a_token_late(patch: Patch) -> None:
    original = branch_points.fork_source

    def fork_source(play: Any, which: Any, step: int, substitutes: Any) -> Any:
        return original(play, which, min(step + 1, LENGTH - 1), substitutes)

    patch.setattr(branch_points, "fork_source", fork_source)


def leave_divergences_unmatched(patch: Patch) -> None:
    original = forks.Decision.match
    patch.setattr(
        forks.Decision, "match", lambda self, *args, **options: original(self, *args, **(options | {"tolerance": 1e9}))
    )


def read_the_values_of_other_items(patch: Patch) -> None:
    original = critic.critic_report
    patch.setattr(
        critic, "critic_report", lambda value, *args, **options: original(np.roll(value, 1, 0), *args, **options)
    )


def count_ties_as_told(patch: Patch) -> None:
    def pairs(score: Any, positive: Any) -> Any:
        return (score[positive][:, None] >= score[~positive][None, :]).astype(np.float64)

    patch.setattr(critic, "pairs_won", pairs)


def count_what_is_equal_as_helped(patch: Patch) -> None:
    """An action that leaves the reward as it was counts as one that helps."""
    original = critic.own_headroom

    def table(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        return found._replace(reward=found.reward + 1e-3)

    patch.setattr(critic, "own_headroom", table)


def try_no_action(patch: Patch) -> None:
    original = critic.own_headroom

    def table(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        return found._replace(reward=np.repeat(found.unsteered[:, None], found.reward.shape[1], 1))

    patch.setattr(critic, "own_headroom", table)


def one_in_a_thousand(case: Case) -> None:
    check_one_in_a_thousand(case.given("planted"), case.run, 0)


def two_contexts(case: Case) -> None:
    check_two_contexts(case.given("planted"), case.run, 0)


def reward_at_the_end(case: Case) -> None:
    check_reward_is_at_the_end(case.given("tiny_llama"), case.given("sae"))


def divergence_costs(case: Case) -> None:
    check_divergence_costs_reward(case.given("tiny_llama"), case.given("sae"))


def delayed_reward(case: Case) -> None:
    check_delayed_reward(case.given("choice"), case.given("choice_dictionary"), case.run)


def a_mask(case: Case) -> None:
    check_a_mask_is_kept(case.given("planted"), case.run)


def branch_point(case: Case) -> None:
    check_branch_point(case.given("choice"), case.given("choice_dictionary"))


def seeing_critic(case: Case) -> None:
    check_seeing_critic(case.given("seeing"))


def blind_critic(case: Case) -> None:
    check_blind_critic(case.given("blind"))


def training_a_seeing_critic(case: Case) -> None:
    check_seeing_critic(Bottleneck.trained(case.given("planted"), case.run))


MUTATIONS = [
    Mutation(reward_the_first_decision, reward_at_the_end),
    Mutation(reward_behind_the_end, reward_at_the_end),
    Mutation(reward_divergence, divergence_costs),
    Mutation(penalise_at_the_end, divergence_costs),
    Mutation(reward_the_first_decision, delayed_reward),
    Mutation(reward_divergence, delayed_reward),
    Mutation(never_explore, one_in_a_thousand),
    Mutation(share_draws_between_copies, one_in_a_thousand),
    Mutation(reward_the_row_before, two_contexts),
    Mutation(turn_advantages_around, two_contexts),
    Mutation(observe_nothing, two_contexts),
    Mutation(learn_from_other_observations, two_contexts),
    Mutation(ignore_the_mask, a_mask),
    Mutation(fork_a_token_late, branch_point),
    Mutation(leave_divergences_unmatched, branch_point),
    Mutation(shuffle_the_critics_targets, training_a_seeing_critic),
    Mutation(read_the_values_of_other_items, seeing_critic, ("seeing",)),
    Mutation(count_what_is_equal_as_helped, seeing_critic, ("seeing",)),
    Mutation(try_no_action, seeing_critic, ("seeing",)),
    Mutation(count_ties_as_told, blind_critic, ("blind",)),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{m.apply.__name__}-{m.check.__name__}" for m in MUTATIONS])
def test_the_check_fails(
    mutation: Mutation, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Patch
) -> None:
    for name in mutation.trained:
        request.getfixturevalue(name)
    mutation.apply(monkeypatch)
    with pytest.raises(AssertionError):
        mutation.check(Case(request.getfixturevalue, tmp_path / "run"))
