"""The demo's second part: a policy that picks a feature at each prompt, trained in about two minutes, beside controls.

The task is the two-context IOI mixture: a cue before each sentence says which of two names is wanted, so that no single
feature can serve both. So short a training shows how the parts work, not what policies can do: `docs/results.md` has
longer ones, and their headroom on more items than the few (`headroom_items`) that there is time for here.
Runs, controls and files are those of `trimtab policy train` and `policy evaluate`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.dictionaries import DictionaryConfig
from trimtab.policies.config import PolicyConfig
from trimtab.policies.evaluate import EvaluateConfig, evaluate_policy
from trimtab.policies.files import EVALUATION_FILE
from trimtab.policies.headroom.candidates import NothingAllowedError
from trimtab.policies.ppo import PPOConfig
from trimtab.policies.train import run_policy_train
from trimtab.runs import part_of
from trimtab.runs.tables import INTERVAL, SIGNED, Column, text_table
from trimtab.studies.demo import DemoConfig, DemoResult, run_demo
from trimtab.tasks import UnsuitedModelError

ARMS = ("unsteered", "random at equal dose", "static", "static at equal dose", "policy")
"""Arms that the summary shows, where they could be had."""


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


@dataclass(frozen=True, kw_only=True)
class DemoPolicy:
    """What came of it."""

    run: Path
    training: dict[str, Any]
    """The results of `trimtab policy train`."""
    result: dict[str, Any]
    """The task's part of `evaluation.json`."""

    def to_json(self) -> dict[str, Any]:
        """Rewards of the arms with intervals, and where the run is."""
        return {
            "run": str(self.run),
            "task": self.result["task"],
            "items": self.result["items"],
            "reward": {arm["label"]: arm["reward"] for arm in self._arms()},
            "policy_minus": {arm["label"]: arm["difference"] for arm in self._arms() if arm["label"] != "policy"},
            "training_seconds": self.training["seconds"],
            "warnings": list(self.training["warnings"]),
        }

    def _arms(self) -> list[dict[str, Any]]:
        arms = {arm["label"]: arm for arm in self.result["arms"]}
        return [arms[label] for label in ARMS if label in arms]

    def render(self) -> str:
        """Mean rewards, the policy's difference to each."""
        found = self.to_json()
        lines = [
            f"a policy that picks one feature per prompt, {found['task']}, {found['items']} test items "
            f"(trained in {found['training_seconds']:.0f} s; 95% intervals over items; one seed):"
        ]
        columns = [
            Column("arm", "label"),
            Column("reward", "reward", INTERVAL),
            Column("policy − this", "difference", SIGNED),
        ]
        lines.append(text_table(columns, self._arms(), indent="  "))
        return "\n".join([*lines, *(f"  {warning}" for warning in found["warnings"]), f"  {self.run}"])


@dataclass(frozen=True, kw_only=True)
class WholeDemo:
    """Both parts of the demo."""

    features: DemoResult
    policy: DemoPolicy | None
    left_out: str = ""
    """Why there is no policy, if it was asked for and its task does not suit the model or the SAE."""

    @property
    def run(self) -> Path:
        """The demo's directory."""
        return self.features.run

    def render(self) -> str:
        """What both parts found."""
        second = self.policy.render() if self.policy else self.left_out
        return "\n\n".join(part for part in (self.features.render(), second) if part)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the policy's under `policy`."""
        policy = self.policy.to_json() if self.policy else None
        return {**self.features.to_json(), "policy": policy, "policy_left_out": self.left_out}


def run_whole_demo(config: DemoConfig, policy: PolicyConfig = POLICY, test_items: int = TEST_ITEMS) -> WholeDemo:
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
        return WholeDemo(features=features, policy=None)
    own = part_of(config, DictionaryConfig)
    try:
        found = run_demo_policy(replace(policy, **own, seed=config.seed, run=config.run / "policy"), test_items)
    except (UnsuitedModelError, NothingAllowedError) as error:
        return WholeDemo(features=features, policy=None, left_out=f"no policy: {error.line}")
    return WholeDemo(features=features, policy=found)


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
