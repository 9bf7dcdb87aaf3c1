"""The demo's last part: a policy that picks a feature at each prompt, trained in a minute or two, beside controls.

The task is the two-context IOI mixture: a cue before each sentence says which of two names is wanted, so that no single
feature can serve both. So short a training shows how the parts work, not what policies can do: `docs/results.md` has
longer ones, and their headroom on more items than the few (`headroom_items`) that there is time for here.
Runs, controls and files are those of `trimtab policy train` and `policy evaluate`.
"""

from __future__ import annotations

import json
from typing import Any

from trimtab.policies.config import PolicyConfig
from trimtab.policies.evaluate import EvaluateConfig, evaluate_policy
from trimtab.policies.file_names import EVALUATION_FILE
from trimtab.policies.headroom.candidates import NothingAllowedError
from trimtab.policies.ppo import PPOConfig
from trimtab.policies.train import run_policy_train
from trimtab.runs import read_typed
from trimtab.studies.demo_result import DemoPolicy, PolicyArm
from trimtab.tasks import UnsuitedModelError

POLICY_SIZES: dict[str, Any] = {"headroom_items": 4, "train_items": 96, "validation_items": 48, "iterations": 24}
POLICY = PolicyConfig(
    task="ioi-mixture",
    dose=1.0,
    head="decoder",  # what one feature earned speaks for those that point the same way
    ppo=PPOConfig(clip=0.3, entropy_bonus=0.05),
    samples=12,
    **POLICY_SIZES,
)
"""As `trimtab policy train`, with sizes for a few minutes on two cores; model, SAE, device and seed are the demo's."""
TEST_ITEMS = 96
"""Items that the result is reported on."""
ARMS = ("unsteered", "random at equal dose", "static", "static at equal dose", "policy")
"""Arms that are shown, where they could be had."""


def run_demo_policy(config: PolicyConfig, test_items: int) -> tuple[DemoPolicy | None, str]:
    """Train and evaluate, or read back what is there; else why there is nothing.

    Raises:
        UserError: see `run_policy_train` and `evaluate_policy`.
    """
    try:
        summary = run_policy_train(config)
        file = summary.run / EVALUATION_FILE
        if not file.exists():
            evaluate_policy(
                EvaluateConfig(
                    policy=(summary.run,), items=test_items, control=("random", "static"), equal_kl=False, draws=1,
                    used=16, n_random=16, companions=False, seed=config.seed,
                )
            )  # fmt: skip
    except (UnsuitedModelError, NothingAllowedError) as error:
        return None, error.line
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["result"]
    arms = {arm["label"]: arm for arm in result["arms"]}
    rows = [{name: arms[label][name] for name in ("label", "reward", "difference")} for label in ARMS if label in arms]
    found = DemoPolicy(
        run=str(summary.run),
        task=result["task"],
        items=result["items"],
        arms=read_typed(tuple[PolicyArm, ...], rows, str(file)),
        training_seconds=summary.results["seconds"],
        warnings=tuple(summary.results["warnings"]),
    )
    return found, ""
