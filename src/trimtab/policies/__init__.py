"""Policies that pick a feature at each token: headroom, training, evaluation beside controls, analyses.

Names are loaded when they are first asked for: what only reads runs needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.policies.analyses.command import AnalyzeConfig, PolicyAnalysis, analyze_policy
    from trimtab.policies.compare import CompareConfig, RunComparison, compare_runs
    from trimtab.policies.config import PolicyConfig
    from trimtab.policies.evaluate import EvaluateConfig, evaluate_policy
    from trimtab.policies.headroom.command import HeadroomConfig, run_headroom
    from trimtab.policies.headroom.result import Headroom, HeadroomResult
    from trimtab.policies.headroom.table import HeadroomTable, headroom_table
    from trimtab.policies.networks import Policy
    from trimtab.policies.on_prompts import LearnedPolicy, train_policy
    from trimtab.policies.ppo import PPOConfig
    from trimtab.policies.rollout import Rollouts, roll_out
    from trimtab.policies.setup import Setup
    from trimtab.policies.source import Decisions, PolicySource
    from trimtab.policies.train import TrainedPolicy, TrainingSummary, load_policy, run_policy_train

__all__ = [
    "AnalyzeConfig",
    "CompareConfig",
    "Decisions",
    "EvaluateConfig",
    "Headroom",
    "HeadroomConfig",
    "HeadroomResult",
    "HeadroomTable",
    "LearnedPolicy",
    "PPOConfig",
    "Policy",
    "PolicyAnalysis",
    "PolicyConfig",
    "PolicySource",
    "Rollouts",
    "RunComparison",
    "Setup",
    "TrainedPolicy",
    "TrainingSummary",
    "analyze_policy",
    "compare_runs",
    "evaluate_policy",
    "headroom_table",
    "load_policy",
    "roll_out",
    "run_headroom",
    "run_policy_train",
    "train_policy",
]

_PLACES = {
    "analyses.command": ("AnalyzeConfig", "PolicyAnalysis", "analyze_policy"),
    "compare": ("CompareConfig", "RunComparison", "compare_runs"),
    "config": ("PolicyConfig",),
    "evaluate": ("EvaluateConfig", "evaluate_policy"),
    "headroom.command": ("HeadroomConfig", "run_headroom"),
    "headroom.result": ("Headroom", "HeadroomResult"),
    "headroom.table": ("HeadroomTable", "headroom_table"),
    "networks": ("Policy",),
    "on_prompts": ("LearnedPolicy", "train_policy"),
    "ppo": ("PPOConfig",),
    "rollout": ("Rollouts", "roll_out"),
    "setup": ("Setup",),
    "source": ("Decisions", "PolicySource"),
    "train": ("TrainedPolicy", "TrainingSummary", "load_policy", "run_policy_train"),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
