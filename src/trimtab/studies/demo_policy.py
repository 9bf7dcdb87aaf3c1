"""The demo's second part: a policy that picks a feature at each prompt, trained in about two minutes, beside controls.

The task is the two-context IOI mixture: a cue before each sentence says which of two names is wanted, so that no single
feature can serve both. So short a training shows how the parts work, not what policies can do: `docs/results.md` has
longer ones, and their headroom on more items than the few (`headroom_items`) that there is time for here.
Runs, controls and files are those of `trimtab policy train` and `policy evaluate`.
"""

from __future__ import annotations

import json
from dataclasses import replace

from trimtab.dictionaries import DictionaryConfig
from trimtab.policies.config import PolicyConfig
from trimtab.policies.evaluate import EvaluateConfig, evaluate_policy
from trimtab.policies.file_names import EVALUATION_FILE
from trimtab.policies.headroom.candidates import NothingAllowedError
from trimtab.policies.ppo import PPOConfig
from trimtab.policies.train import run_policy_train
from trimtab.runs import part_of
from trimtab.studies.demo import DemoConfig, run_demo
from trimtab.studies.result import DemoPolicy, DemoResult
from trimtab.tasks import UnsuitedModelError

POLICY = PolicyConfig(
    task="ioi-mixture",
    dose=1.0,
    head="decoder",  # what one feature earned speaks for those that point the same way
    ppo=PPOConfig(clip=0.3, entropy_bonus=0.05),
    headroom_items=4,
    train_items=96,
    validation_items=48,
    iterations=36,
    samples=12,
)
"""As `trimtab policy train`, with sizes for a few minutes on two cores; model, SAE, device and seed are the demo's."""
TEST_ITEMS = 96
"""Items that the result is reported on."""


def run_whole_demo(config: DemoConfig, policy: PolicyConfig = POLICY, test_items: int = TEST_ITEMS) -> DemoResult:
    """Run what is left of the demo: its features and, if the config asks for it, a policy.

    Args:
        config: of the demo.
        policy: how the policy is trained.
        test_items: items that it is evaluated on.

    Raises:
        UserError: see `run_demo`, `run_policy_train` and `evaluate_policy`. The policy's part alone is left out where
            its task cannot be had with the model, or no feature of the SAE may be chosen on it.
    """
    features = run_demo(config)
    if not config.policy:
        return features
    own = part_of(config, DictionaryConfig)
    try:
        found = run_demo_policy(replace(policy, **own, seed=config.seed, run=config.run / "policy"), test_items)
    except (UnsuitedModelError, NothingAllowedError) as error:
        return replace(features, policy_left_out=f"no policy: {error.line}")
    return replace(features, policy=found)


def run_demo_policy(config: PolicyConfig, test_items: int) -> DemoPolicy:
    """Train and evaluate, or read back what is there.

    Raises:
        UserError: see `run_policy_train` and `evaluate_policy`.
    """
    summary = run_policy_train(config)
    file = summary.run / EVALUATION_FILE
    if not file.exists():
        evaluate_policy(
            EvaluateConfig(
                policy=(summary.run,), items=test_items, control=("random", "static"), equal_kl=False, draws=1,
                used=16, n_random=16, companions=False, seed=config.seed,
            )
        )  # fmt: skip
    return DemoPolicy(run=summary.run, training=summary.results, result=json.loads(file.read_text())["result"])
