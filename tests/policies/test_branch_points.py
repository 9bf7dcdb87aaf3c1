"""Branch points on a model where the one token whose choice decides is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from planted_choice import DECISIVE, LENGTH, PUSHING, Letters, choice_model, choice_sae, fixed_policy
from scipy.stats import fisher_exact

from trimtab.dictionaries.standard import Standard
from trimtab.lm import LanguageModel
from trimtab.policies.analyses.branch_points import branch_points, fisher_greater
from trimtab.policies.analyses.forks import NO_EDIT, OWN_CHOICE, Decision, Substitutes, fork_source
from trimtab.policies.analyses.played import PolicyPlay, right
from trimtab.policies.config import PolicyConfig
from trimtab.policies.networks import Policy
from trimtab.policies.setup import Setup
from trimtab.steering import token_effects


@pytest.fixture(scope="module")
def model(tiny_llama: LanguageModel) -> LanguageModel:
    return choice_model(tiny_llama)


@pytest.fixture(scope="module")
def dictionary(model: LanguageModel) -> Standard:
    return choice_sae(model)


def setup_of(model: LanguageModel, sae: Standard, **settings: object) -> Setup:
    values: dict[str, object] = {
        "task": "letters", "mask": "none", "dose": 0.7, "options_only": True, "hidden": (), "max_new_tokens": LENGTH,
    }  # fmt: skip
    config = PolicyConfig(**(values | settings))  # pyright: ignore[reportArgumentType]
    return Setup.with_parts(config, model, sae, Letters.load())


def play_of(setup: Setup, policy: Policy, count: int, *, wanted: bool = True, greedy: bool = True) -> PolicyPlay:
    """Rollouts of items that the unsteered model gets right (or wrong) and that no push of its own is needed for."""
    episodes = setup.episodes("train")
    unsteered = PolicyPlay.of(setup, policy, episodes).unsteered
    which = np.flatnonzero(right(unsteered) == wanted)[:count].tolist()
    assert len(which) == count
    return PolicyPlay.of(setup, policy, episodes.take(which), greedy=greedy)


def test_the_one_decisive_token_is_found_and_no_other(model: LanguageModel, dictionary: Standard) -> None:
    play = play_of(setup_of(model, dictionary), fixed_policy(dictionary, [64, *PUSHING]), 5)
    found = branch_points(play, items=5, tokens=LENGTH, candidates=8, draws=4)
    assert [(t.item, t.step) for t in found.tokens] == list(
        itertools.product((i.id for i in play.episodes.items), range(LENGTH))
    )
    assert {(t.item, t.step) for t in found.found} == {(item.id, DECISIVE) for item in play.episodes.items}
    assert found.not_repeated == 0
    for token in found.tokens:
        assert token.feature == NO_EDIT
        assert not token.flips_without
        assert token.random_flips == 0
        assert token.flips == (token.tried if token.step == DECISIVE else 0)
        assert token.tried + token.unmatched == 8
    pairs = {(f.item, f.step, f.pair): f for f in found.forks if f.kind == "candidate"}
    randoms = [f for f in found.forks if f.kind == "random"]
    assert randoms
    for fork in randoms:
        assert fork.feature not in PUSHING
        assert fork.kl_local == pytest.approx(pairs[fork.item, fork.step, fork.pair].kl_local, rel=0.1)
    # Rates are 1 at one step in four and 0 elsewhere.
    assert found.excess is not None
    assert found.excess.estimate == pytest.approx(1 / LENGTH)
    assert found.rescued is None


def test_candidates_that_change_nothing_give_no_branch_point(model: LanguageModel, dictionary: Standard) -> None:
    play = play_of(setup_of(model, dictionary), fixed_policy(dictionary, [64, *range(20, 28)]), 3)
    found = branch_points(play, items=3, tokens=LENGTH, candidates=8)
    assert found.tokens
    assert not found.found
    assert all(token.q_value == 1 for token in found.tokens)


def test_a_wrong_answer_that_a_choice_would_mend_counts_as_rescued(model: LanguageModel, dictionary: Standard) -> None:
    """Where the base letter is Y nothing that pushes towards Y helps; one feature that pushes back would."""
    back = choice_sae(model)
    with torch.no_grad():
        back.W_dec[0] *= -1
    for sae, share in ((dictionary, 0.0), (back, 1.0)):
        play = play_of(setup_of(model, sae), fixed_policy(sae, [64, *PUSHING]), 3, wanted=False)
        found = branch_points(play, items=3, tokens=LENGTH, candidates=8, draws=4, tolerance=0.3)
        assert found.rescued is not None
        assert (found.rescued.estimate, found.rescued.n) == (share, 3)


@pytest.mark.parametrize("mask", ["none", "accumulated", "current"])
def test_a_fork_repeats_the_rollout_until_its_decision(
    tiny_llama: LanguageModel, model: LanguageModel, dictionary: Standard, mask: str
) -> None:
    """Drawn actions and drawn tokens: a copy with its own choice ends as before; edits before the fork are the same."""
    del tiny_llama
    policy = Policy.build(dictionary.directions, hidden=(8,), seed=1)
    with torch.no_grad():
        policy.actor.head.weight.mul_(60)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
    setup = setup_of(model, dictionary, mask=mask, temperature=1.0, options_only=False, hidden=(8,))
    play = PolicyPlay.of(setup, policy, setup.episodes("train", 6), greedy=False)
    assert len(set(play.decisions.action[play.decisions.valid].tolist())) > 5
    long = [i for i in range(6) if play.steps[i] == LENGTH]
    for step in range(LENGTH):
        feature = torch.tensor([[OWN_CHOICE, NO_EDIT, 9]] * len(long))
        source = fork_source(play, long, step, Substitutes(feature, torch.full(feature.shape, 1.5)))
        decoded, outcomes = play.decode_again(source, long, step=step, repeats=3)
        log = decoded.edits
        n = source.past.directions(source.sites[0]).shape[0]
        for i, item in enumerate(long):
            own = 3 * i
            assert decoded.token_ids[own] == play.decoded.token_ids[item][step:]
            assert outcomes[own].reward == play.outcomes[item].reward
            first = len(play.episodes.prompts[item]) - 1
            for copy in range(3):
                mine = log.row == own + copy
                chosen = {int(p) - first: int(f) for p, f in zip(log.position[mine], log.feature[mine, 0], strict=True)}
                before = play.decisions.action[item, :step].tolist()
                assert [chosen[s] if chosen[s] >= 0 else 64 for s in range(step)] == before
                after = chosen[step] - n if chosen[step] >= 0 else 64
                assert after == [int(play.decisions.action[item, step]), 64, 9][copy]
            if step + 1 < LENGTH:
                mine = (log.row == own) & (log.position > first + step)
                later = torch.where(log.feature[mine, 0] >= 0, log.feature[mine, 0] - n, 64)
                assert later.tolist() == play.decisions.action[item, step + 1 :].tolist()


def test_local_divergence_is_that_of_the_measuring_pass(model: LanguageModel, dictionary: Standard) -> None:
    play = play_of(setup_of(model, dictionary), fixed_policy(dictionary, [0, 30, 31]), 2)
    effects = token_effects(model, play.decoded, play.source, top_k=1)
    for item, step in itertools.product(range(2), range(LENGTH)):
        kl = Decision(play, item, step).local_kl(torch.tensor([0, 5]), torch.tensor([0.7, 0.0]))
        assert float(kl[0]) == pytest.approx(effects.kl_local[item][step], rel=1e-3, abs=1e-6)
        assert float(kl[1]) == pytest.approx(0, abs=1e-6)


def test_fisher_is_scipys() -> None:
    for n_a, n_b in ((3, 3), (8, 8), (5, 7)):
        for a, b in itertools.product(range(n_a + 1), range(n_b + 1)):
            expected = fisher_exact([[a, n_a - a], [b, n_b - b]], alternative="greater").pvalue
            assert fisher_greater(a, n_a, b, n_b) == pytest.approx(expected, rel=1e-9)


def test_too_few_candidates_for_the_number_of_tokens_are_warned_of(model: LanguageModel, dictionary: Standard) -> None:
    play = play_of(setup_of(model, dictionary), fixed_policy(dictionary, [64, *PUSHING]), 3)
    found = branch_points(play, items=3, tokens=LENGTH, candidates=2, draws=4)
    assert any("p is at least 0.17" in warning for warning in found.warnings)
    assert not found.found
