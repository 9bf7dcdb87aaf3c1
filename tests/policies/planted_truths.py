"""What trainings and analyses must find where the truth is planted, as plain functions.

`test_planted.py` runs them as they are and under mutations, with each of which the check it names must fail.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from planted_choice import DECISIVE, LENGTH, PUSHING, Letters, fixed_policy, letters_setup
from planted_readout import SITE, HalfHurt, Planted, planted_sae
from readout_setups import readout_setup

from trimtab.dictionaries import Standard
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.lm import LanguageModel
from trimtab.policies import networks
from trimtab.policies.analyses.branch_points import branch_points
from trimtab.policies.analyses.critic import helped_by_headroom, judge_critic
from trimtab.policies.analyses.forks import NO_EDIT
from trimtab.policies.analyses.policy_rollouts import PolicyRollouts, right
from trimtab.policies.networks import Critic, Policy
from trimtab.policies.ppo import PPOConfig
from trimtab.policies.rollout import roll_out
from trimtab.policies.setup import Setup
from trimtab.policies.train import fit
from trimtab.runs import Run
from trimtab.steering import StaticSource
from trimtab.tasks import SPLITS, Item

FEATURES, REWARDED = 1_000, 617
"""Features of the wide dictionary, and the one that earns a reward."""
EITHER = (0, 1)
"""The features towards Y and towards N of the planted dictionary."""
POLICY_KL = "policy/kl_unsteered"
ITERATIONS = 40
"""Of 512 rollouts each: in so many the policy must have learnt, where two of 32 features matter."""


def training(model: LanguageModel, sae: Standard, task: type[Planted], run: Path, **settings: object) -> Setup:
    """A setup of a training in which only the last policy counts."""
    values: dict[str, object] = {
        "run": run, "hidden": (16,), "batch_size": 1024, "iterations": ITERATIONS, "items_per_iteration": 32,
        "samples": 16, "validate_every": 100, "checkpoint_every": 100,
        "ppo": PPOConfig(lr=0.01, entropy_bonus=0.003),
    }  # fmt: skip
    return readout_setup(model, sae, task, **(values | settings))


def trained(setup: Setup) -> Policy:
    assert setup.config.run is not None
    with Run.open(setup.config.run, "policy train", setup.config) as run:
        return fit(setup, run).policy


def rewards_of(setup: Setup) -> list[float]:
    """Mean reward of each iteration's rollouts."""
    assert setup.config.run is not None
    lines = [json.loads(line) for line in (setup.config.run / "metrics.jsonl").open()]
    return [line["charts/reward"] for line in lines if "charts/reward" in line]


def first_choices(rollouts: PolicyRollouts) -> np.ndarray:
    """What the policy picks first in each item; n for no edit."""
    return rollouts.decisions.action[:, 0].cpu().numpy()


def wrong_items(model: LanguageModel, split: str) -> list[Item]:
    """Items that the planted model gets wrong by itself."""
    prompts = readout_setup(model, planted_sae(model), Planted).prompts(split)
    outcomes = roll_out(model, None, prompts).outcomes
    return [item for item, outcome in zip(prompts.items, outcomes, strict=True) if not outcome.correct]


def task_of(items: dict[str, list[Item]]) -> type[Planted]:
    """The task with other items."""

    class Given(Planted):
        name = "given"

        @classmethod
        def load(cls, data: object = None, tokenizer: object = None) -> Planted:
            return cls(items)

    return Given


def wide_sae(model: LanguageModel) -> Standard:
    """A thousand features, of which one pushes the coordinate that the model answers by; the others leave it alone."""
    rows = torch.randn(FEATURES, model.d_model, generator=torch.Generator().manual_seed(4))
    rows[:, 0] = 0
    rows[REWARDED] = 0
    rows[REWARDED, 0] = 1.0
    rows /= rows.norm(dim=1, keepdim=True)
    info = DictionaryInfo(architecture="standard", model=model.name, site=SITE)
    return Standard(rows.T.contiguous(), torch.zeros(FEATURES), rows, torch.zeros(model.d_model), info=info)


def check_one_in_a_thousand(model: LanguageModel, run: Path, seed: int) -> None:
    """A prompt whose answer only one feature makes right: nothing is earned until it is tried; then it is learnt.

    20 iterations of 1,024 rollouts: each feature could be tried 20 times.
    """
    one = wrong_items(model, "train")[0]
    setup = training(
        model, wide_sae(model), task_of({split: [replace(one, id=f"one/{split}")] for split in SPLITS}), run, seed=seed,
        iterations=20, items_per_iteration=1, samples=1024,
        ppo=PPOConfig(lr=0.02, minibatch=256, clip=1.0),
    )  # fmt: skip
    policy = trained(setup)
    rewards = rewards_of(setup)
    assert rewards[0] < 0.01, "it was found before it was looked for"
    assert rewards[-1] > 0.9
    rollouts = PolicyRollouts.of(setup, policy, setup.prompts("test"))
    assert not right(rollouts.unsteered).any()
    assert right(rollouts.outcomes).all()
    assert first_choices(rollouts).tolist() == [REWARDED]


def check_two_contexts(model: LanguageModel, run: Path, seed: int) -> None:
    """Y is right behind one cue and N behind the other: each feature helps in one context and hurts in the other.

    40 iterations of 512 rollouts, judged by what the policy does on training items, and by held-out ones.
    """
    setup = training(model, planted_sae(model), HalfHurt, run, seed=seed)
    policy = trained(setup)
    for split, reached, above in (("train", 0.9, 0.3), ("test", 0.75, 0.15)):
        rollouts = PolicyRollouts.of(setup, policy, setup.prompts(split))
        static = max(
            float(
                right(roll_out(model, StaticSource(setup.dictionary, feature, 2.0), rollouts.prompts).outcomes).mean()
            )
            for feature in range(setup.dictionary.n_features)
        )
        assert static < 0.65, "one feature is enough"
        assert right(rollouts.outcomes).mean() > max(reached, static + above)
        wrong = ~right(rollouts.unsteered)
        cue = np.array([item.prompt[-1] == "/" for item in rollouts.prompts.items])
        for feature, context in zip(EITHER, (cue, ~cue), strict=True):
            mine = first_choices(rollouts)[wrong & context]
            assert len(mine) > 3
            assert (mine == feature).mean() > reached - 0.15


def check_a_mask_is_kept(model: LanguageModel, run: Path) -> None:
    """The one feature that helps fires where the answer is right already: under `current` nothing can be earned."""
    task = task_of({split: wrong_items(model, split) for split in SPLITS})
    setup = training(model, planted_sae(model), task, run, mask="current", iterations=3, items_per_iteration=16)
    rollouts = PolicyRollouts.of(setup, trained(setup), setup.prompts("test"), greedy=False)
    assert rewards_of(setup) == [0.0] * 3
    fires = setup.dictionary.encode(rollouts.decisions.observation[:, 0]) > 0
    chosen = torch.from_numpy(first_choices(rollouts)).long()
    steered = chosen < setup.dictionary.n_features
    assert steered.any()
    assert fires[steered].gather(1, chosen[steered, None]).all()


def check_branch_point(model: LanguageModel, sae: Standard) -> None:
    """Of four letters one decides: its token is a branch point in every item, and no other is."""
    setup = letters_setup(model, sae)
    policy = fixed_policy(sae, [sae.n_features, *PUSHING])
    prompts = setup.prompts("train")
    which = np.flatnonzero(right(PolicyRollouts.of(setup, policy, prompts).unsteered))[:5].tolist()
    assert len(which) == 5
    rollouts = PolicyRollouts.of(setup, policy, prompts.take(which))
    found = branch_points(rollouts, items=5, tokens=LENGTH, candidates=8, draws=4)
    ids = [item.id for item in rollouts.prompts.items]
    assert [(t.item, t.step) for t in found.tokens] == list(itertools.product(ids, range(LENGTH)))
    assert {(t.item, t.step) for t in found.found} == {(item, DECISIVE) for item in ids}
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
        assert abs(fork.kl_local / pairs[fork.item, fork.step, fork.pair].kl_local - 1) <= 0.1
    # Rates are 1 at one step in four and 0 elsewhere.
    assert found.excess is not None
    assert abs(found.excess.estimate - 1 / LENGTH) < 1e-6
    assert found.rescued is None


def check_delayed_reward(model: LanguageModel, sae: Standard, run: Path) -> None:
    """The third of four letters earns what the fourth brings; every divergence costs a little.

    20 iterations of 256 rollouts on prompts whose third letter is wrong without an edit.
    """
    plain = letters_setup(model, sae)

    def wrong(split: str) -> list[Item]:
        prompts = plain.prompts(split)
        outcomes = roll_out(model, None, prompts).outcomes
        pairs = zip(prompts.items, outcomes, strict=True)
        return [replace(item, answer="Y") for item, outcome in pairs if outcome.correct]  # correct: the letter is N

    task = Letters({split: wrong(split) for split in SPLITS})
    config = replace(
        plain.config, run=run, hidden=(16,), batch_size=1024, iterations=20, items_per_iteration=8, samples=32,
        validate_every=1000, checkpoint_every=100, headroom_items=0, kl_penalty=0.1,
        ppo=PPOConfig(lr=0.02, entropy_bonus=0.003),
    )  # fmt: skip
    setup = Setup.with_parts(config, model, sae, task)
    trained(setup)
    rewards = rewards_of(setup)
    assert rewards[0] < 0.3, "it was found before it was looked for"
    assert rewards[-1] > 0.9
    kl = [line[POLICY_KL] for line in map(json.loads, (run / "metrics.jsonl").open()) if POLICY_KL in line]
    assert kl[-1] < 0.7 * kl[0]


class BlindCritic(Critic):
    """Sees nothing of the activation, so that all it can learn is the mean return."""

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.zeros_like(observation))


@dataclass(frozen=True)
class Bottleneck:
    """A policy and its critic, trained where no feature leads to N.

    Behind one cue a feature corrects every wrong answer, behind the other nothing does.
    """

    setup: Setup
    policy: Policy

    @classmethod
    def trained(cls, model: LanguageModel, run: Path, critic: type[Critic] = Critic) -> Bottleneck:
        sae = planted_sae(model)
        with torch.no_grad():
            sae.W_dec[EITHER[1]] = sae.W_dec[2]
        setup = training(model, sae, HalfHurt, run)
        with mock.patch.object(networks, "Critic", critic):
            return cls(setup, trained(setup))

    def verdict(self, sae: Standard | None = None) -> str:
        """On items that the model gets wrong by itself; with the actions of another dictionary, if one is given."""
        setup = self.setup
        if sae is not None:
            setup = Setup.with_parts(setup.config, setup.model, sae, setup.task)
        rollouts = PolicyRollouts.of(setup, self.policy, setup.prompts("train"))
        report = judge_critic(rollouts, helped_by_headroom(rollouts, items=100))
        assert min(report.counts["corrected"], report.counts["incorrect"]) > 5
        return next(one.label for one in report.verdicts if one.group == "unsteered wrong")


def check_seeing_critic(seeing: Bottleneck) -> None:
    """Where no action helps the policy is limited; where one would, what it does can be improved."""
    assert seeing.verdict() == "policy_limited"
    assert seeing.verdict(planted_sae(seeing.setup.model)) == "improvable"


def check_blind_critic(blind: Bottleneck) -> None:
    assert blind.verdict() == "critic_error"
