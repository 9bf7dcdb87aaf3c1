"""The ledger against the log of edits, effects that are planted, and texts that must not be shown."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from planted_choice import DECISIVE, LENGTH, PUSHING, fixed_policy, letters_setup

from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel
from trimtab.policies.analyses.ledger import Ledger, feature_ledger
from trimtab.policies.analyses.policy_rollouts import HIDDEN, PolicyRollouts, rewards, right
from trimtab.policies.config import PolicyConfig
from trimtab.policies.networks import Policy
from trimtab.policies.setup import Setup
from trimtab.steering import token_effects
from trimtab.tasks import Item
from trimtab.tasks.refusals import RefusalTask


@pytest.fixture(scope="module")
def varied(choice: LanguageModel, choice_dictionary: Standard) -> PolicyRollouts:
    """Drawn actions of a policy that prefers some features in some places."""
    policy = Policy.build(choice_dictionary.directions, hidden=(8,), seed=1)
    with torch.no_grad():
        policy.actor.head.weight.mul_(150)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
        policy.actor.head.bias[64] = 2.0  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    setup = letters_setup(choice, choice_dictionary, dose=0.9, hidden=(8,), mask="accumulated", options_only=False)
    return PolicyRollouts.of(setup, policy, setup.prompts("train", 16), greedy=False)


@pytest.fixture(scope="module")
def ledger(varied: PolicyRollouts) -> Ledger:
    return feature_ledger(varied, ablated=2, contexts=3)


def test_counts_are_those_of_the_log(varied: PolicyRollouts, ledger: Ledger) -> None:
    log = varied.decoded.edits
    used = log.feature[:, 0] >= 0
    assert Counter({e.feature: e.uses for e in ledger.entries}) == Counter(log.feature[used, 0].tolist())
    assert ledger.no_edit == int((~used).sum()) > 0
    assert ledger.decisions == len(log) == sum(map(len, varied.decoded.token_ids))
    assert sum(e.share for e in ledger.entries) == pytest.approx(int(used.sum()) / len(log))
    assert [e.uses for e in ledger.entries] == sorted((e.uses for e in ledger.entries), reverse=True)
    first = torch.tensor([len(prompt) - 1 for prompt in varied.prompts.ids])
    for e in ledger.entries:
        mine = log.feature[:, 0] == e.feature
        steps = (log.position - first[log.row])[mine]
        assert e.items == len(log.row[mine].unique())
        assert (e.first_step, e.last_step) == (int(steps.min()), int(steps.max()))
        assert e.median_step == np.median(steps.numpy())


def test_divergences_and_contexts_are_those_of_the_uses(varied: PolicyRollouts, ledger: Ledger) -> None:
    effects = token_effects(varied.setup.model, varied.decoded, varied.source, top_k=1)
    action = varied.decisions.action
    text = varied.setup.model.decode_ids
    for e in ledger.entries:
        places = ((action == e.feature) & varied.decisions.valid).nonzero().tolist()
        kls = {(varied.prompts.items[i].id, s): effects.kl_local[i][s] for i, s in places}
        assert e.kl_local.estimate == pytest.approx(np.mean(list(kls.values())))
        assert e.kl_local.n == e.items
        assert [c.kl_local for c in e.contexts] == pytest.approx(sorted(kls.values(), reverse=True)[:3])
        assert sum(t.count for t in e.tokens) <= e.uses
        for c in e.contexts:
            assert kls[c.item, c.step] == c.kl_local
            row = next(i for i, item in enumerate(varied.prompts.items) if item.id == c.item)
            ids = [*varied.prompts.ids[row], *varied.decoded.token_ids[row]]
            assert c.before + c.token + c.after == text(ids[max(0, c.position - 16) : c.position + 2], special=True)


def test_the_reward_without_a_feature_is_that_of_a_policy_that_never_picks_it(
    choice: LanguageModel, choice_dictionary: Standard
) -> None:
    """Pushing everywhere ruins every answer that is right unsteered; without the push all are right again."""
    setup = letters_setup(choice, choice_dictionary, dose=0.9)
    prompts = setup.prompts("train")
    policy = fixed_policy(choice_dictionary, [PUSHING[0]])
    unsteered = right(PolicyRollouts.of(setup, policy, prompts).unsteered)
    assert 0 < unsteered.sum() < len(unsteered)
    rollouts = PolicyRollouts.of(setup, policy, prompts)
    assert rewards(rollouts.outcomes).sum() == 0
    (entry,) = feature_ledger(rollouts).entries
    assert (entry.feature, entry.uses, entry.items, entry.share) == (0, LENGTH * len(rollouts), len(rollouts), 1.0)
    assert entry.reward_difference is not None
    assert entry.reward_difference.estimate == pytest.approx(-unsteered.mean())
    assert entry.reward_difference.n == len(rollouts)
    assert all(c.step in range(LENGTH) for c in entry.contexts)
    assert DECISIVE in {c.step for c in feature_ledger(rollouts, contexts=10_000).entries[0].contexts}


def test_only_the_most_used_are_left_out(ledger: Ledger) -> None:
    assert [e.reward_difference is not None for e in ledger.entries] == [True] * 2 + [False] * (len(ledger.entries) - 2)


def test_prompts_of_refusal_tasks_are_never_shown(choice: LanguageModel, choice_dictionary: Standard) -> None:
    class Refusals(RefusalTask):
        name = "refusals"
        chat = False

        @classmethod
        def load(cls, data: object = None, tokenizer: object = None) -> Refusals:
            texts = ["qqsecretqq do", "zzsecretzz it"]
            return cls({"train": [Item(id=f"r/{i}", prompt=t, answer="refusal") for i, t in enumerate(texts)]})

    config = PolicyConfig(task="refusals", mask="none", dose=0.9, hidden=(), max_new_tokens=LENGTH)
    setup = Setup.with_parts(config, choice, choice_dictionary, Refusals.load())
    rollouts = PolicyRollouts.of(setup, fixed_policy(choice_dictionary, [3, 4]), setup.prompts("train"))
    found = feature_ledger(rollouts)
    assert found.entries[0].contexts
    for context in found.entries[0].contexts:
        assert {context.before, context.token, context.after} <= {HIDDEN, ""}
    assert found.entries[0].tokens == ()
    assert "secret" not in str(found)
    assert rollouts.text([7]) == HIDDEN
