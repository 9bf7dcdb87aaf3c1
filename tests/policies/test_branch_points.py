"""Branch points on a model where the one token whose choice decides is known; `test_planted` has that it is found."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from planted_choice import LENGTH, PUSHING, choice_sae, fixed_policy, letters_setup
from scipy.stats import fisher_exact

from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel
from trimtab.policies.analyses.branch_points import branch_points, fisher_greater
from trimtab.policies.analyses.forks import NO_EDIT, OWN_CHOICE, Decision, Substitutes, fork_source
from trimtab.policies.analyses.policy_rollouts import PolicyRollouts, right
from trimtab.policies.networks import Policy
from trimtab.policies.setup import Setup
from trimtab.steering import token_effects


def play_of(setup: Setup, policy: Policy, count: int, *, wanted: bool = True, greedy: bool = True) -> PolicyRollouts:
    """Rollouts of items that the unsteered model gets right (or wrong) and that no push of its own is needed for."""
    prompts = setup.prompts("train")
    unsteered = PolicyRollouts.of(setup, policy, prompts).unsteered
    which = np.flatnonzero(right(unsteered) == wanted)[:count].tolist()
    assert len(which) == count
    return PolicyRollouts.of(setup, policy, prompts.take(which), greedy=greedy)


def test_candidates_that_change_nothing_give_no_branch_point(
    choice: LanguageModel, choice_dictionary: Standard
) -> None:
    rollouts = play_of(
        letters_setup(choice, choice_dictionary), fixed_policy(choice_dictionary, [64, *range(20, 28)]), 3
    )
    found = branch_points(rollouts, items=3, tokens=LENGTH, candidates=8)
    assert found.tokens
    assert not found.found
    assert all(token.q_value == 1 for token in found.tokens)


def test_a_wrong_answer_that_a_choice_would_mend_counts_as_rescued(
    choice: LanguageModel, choice_dictionary: Standard
) -> None:
    """Where the base letter is Y nothing that pushes towards Y helps; one feature that pushes back would."""
    back = choice_sae(choice)
    with torch.no_grad():
        back.W_dec[0] *= -1
    for sae, share in ((choice_dictionary, 0.0), (back, 1.0)):
        rollouts = play_of(letters_setup(choice, sae), fixed_policy(sae, [64, *PUSHING]), 3, wanted=False)
        found = branch_points(rollouts, items=3, tokens=LENGTH, candidates=8, draws=4, tolerance=0.3)
        assert found.rescued is not None
        assert (found.rescued.estimate, found.rescued.n) == (share, 3)


def test_a_random_feature_that_corrects_an_answer_rescues_nothing(
    choice: LanguageModel, choice_dictionary: Standard
) -> None:
    """The policy's candidates all push towards Y; eight features that are none of its actions would push back."""
    back = choice_sae(choice)
    with torch.no_grad():
        back.W_dec[8:16] = -back.W_dec[:8]
    rollouts = play_of(letters_setup(choice, back), fixed_policy(back, [64, *PUSHING]), 3, wanted=False)
    found = branch_points(rollouts, items=3, tokens=LENGTH, candidates=8, draws=6, tolerance=0.3)
    corrected = {fork.item for fork in found.forks if fork.kind == "random" and fork.reward == 1}
    assert corrected, "no random feature helps"
    assert found.rescued is not None
    assert (found.rescued.estimate, found.rescued.n) == (0.0, 3)


@pytest.mark.parametrize("mask", ["none", "accumulated", "current"])
def test_a_fork_repeats_the_rollout_until_its_decision(
    choice: LanguageModel, choice_dictionary: Standard, mask: str
) -> None:
    """Drawn actions and drawn tokens: a copy with its own choice ends as before; edits before the fork are the same."""
    policy = Policy.build(choice_dictionary.directions, hidden=(8,), seed=1)
    with torch.no_grad():
        policy.actor.head.weight.mul_(60)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
    setup = letters_setup(choice, choice_dictionary, mask=mask, temperature=1.0, options_only=False, hidden=(8,))
    rollouts = PolicyRollouts.of(setup, policy, setup.prompts("train", 6), greedy=False)
    assert len(set(rollouts.decisions.action[rollouts.decisions.valid].tolist())) > 5
    long = [i for i in range(6) if rollouts.steps[i] == LENGTH]
    for step in range(LENGTH):
        feature = torch.tensor([[OWN_CHOICE, NO_EDIT, 9]] * len(long))
        source = fork_source(rollouts, long, step, Substitutes(feature, torch.full(feature.shape, 1.5)))
        decoded, outcomes = rollouts.decode_again(source, long, step=step, repeats=3)
        log = decoded.edits
        n = source.past.directions(source.sites[0]).shape[0]
        for i, item in enumerate(long):
            own = 3 * i
            assert decoded.token_ids[own] == rollouts.decoded.token_ids[item][step:]
            assert outcomes[own].reward == rollouts.outcomes[item].reward
            first = len(rollouts.prompts.ids[item]) - 1
            for copy in range(3):
                mine = log.row == own + copy
                chosen = {int(p) - first: int(f) for p, f in zip(log.position[mine], log.feature[mine, 0], strict=True)}
                before = rollouts.decisions.action[item, :step].tolist()
                assert [chosen[s] if chosen[s] >= 0 else 64 for s in range(step)] == before
                after = chosen[step] - n if chosen[step] >= 0 else 64
                assert after == [int(rollouts.decisions.action[item, step]), 64, 9][copy]
            if step + 1 < LENGTH:
                mine = (log.row == own) & (log.position > first + step)
                later = torch.where(log.feature[mine, 0] >= 0, log.feature[mine, 0] - n, 64)
                assert later.tolist() == rollouts.decisions.action[item, step + 1 :].tolist()


def test_local_divergence_is_that_of_the_measuring_pass(choice: LanguageModel, choice_dictionary: Standard) -> None:
    rollouts = play_of(letters_setup(choice, choice_dictionary), fixed_policy(choice_dictionary, [0, 30, 31]), 2)
    effects = token_effects(choice, rollouts.decoded, rollouts.source, top_k=1)
    for item, step in itertools.product(range(2), range(LENGTH)):
        kl = Decision(rollouts, item, step).local_kl(torch.tensor([0, 5]), torch.tensor([0.7, 0.0]))
        assert float(kl[0]) == pytest.approx(effects.kl_local[item][step], rel=1e-3, abs=1e-6)
        assert float(kl[1]) == pytest.approx(0, abs=1e-6)


def test_fisher_is_scipys() -> None:
    for n_a, n_b in ((3, 3), (8, 8), (5, 7)):
        for a, b in itertools.product(range(n_a + 1), range(n_b + 1)):
            expected = fisher_exact([[a, n_a - a], [b, n_b - b]], alternative="greater").pvalue
            assert fisher_greater(a, n_a, b, n_b) == pytest.approx(expected, rel=1e-9)


def test_too_few_candidates_for_the_number_of_tokens_are_warned_of(
    choice: LanguageModel, choice_dictionary: Standard
) -> None:
    rollouts = play_of(letters_setup(choice, choice_dictionary), fixed_policy(choice_dictionary, [64, *PUSHING]), 3)
    found = branch_points(rollouts, items=3, tokens=LENGTH, candidates=2, draws=4)
    assert any("p is at least 0.17" in warning for warning in found.warnings)
    assert not found.found
