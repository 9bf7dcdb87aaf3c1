"""The commands of policies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trimtab.cli.job import Job


def policy_headroom() -> Job:
    """measure what one edit could gain on a task, before training a policy"""
    from trimtab.policies.headroom.command import HeadroomConfig, run_headroom

    return Job(HeadroomConfig, run_headroom, example="--task ioi-mixture --dose 0.5 1 --mask none accumulated")


def policy_train() -> Job:
    """train a policy that picks a feature at each token"""
    from trimtab.policies.config import PolicyConfig
    from trimtab.policies.train import run_policy_train

    example = "--task ioi-mixture --dose 1 --iterations 60 --run runs/mine"
    return Job(PolicyConfig, run_policy_train, example=example, pages=lambda _, summary: [summary.run])


def policy_evaluate() -> Job:
    """show trained policies beside their controls, on items that chose nothing"""
    from trimtab.policies.evaluate import EvaluateConfig, evaluate_policy

    def pages(config: EvaluateConfig, _: object) -> list[Path]:
        return [*config.policy, *([] if config.run is None else [config.run])]

    example = "runs/mine --items 96 --control random static vector"
    return Job(EvaluateConfig, evaluate_policy, ("policy",), example, pages=pages)


def policy_steer() -> Job:
    """continue prompts of your own unsteered and under a trained policy"""
    from trimtab.policies.steering_command import PolicySteerConfig, run_policy_steer

    return Job(PolicySteerConfig, run_policy_steer, ("policy", "prompt"), 'runs/mine "Yesterday I went to the"')


def policy_analyze() -> Job:
    """find where a policy's choices mattered, and what its critic knows"""
    from trimtab.policies.analyses.command import AnalyzeConfig, analyze_policy

    example = "runs/mine --items 64"
    return Job(AnalyzeConfig, analyze_policy, ("run",), example, pages=lambda config, _: config.run[:1])


def policy_compare() -> Job:
    """put several runs of one task side by side: masks, layers, doses, seeds"""
    from trimtab.policies.compare import CompareConfig, compare_runs

    return Job(CompareConfig, compare_runs, ("run",), "runs/mine runs/other")


POLICY_COMMANDS: dict[str, Callable[[], Job]] = {
    "policy headroom": policy_headroom,
    "policy train": policy_train,
    "policy evaluate": policy_evaluate,
    "policy steer": policy_steer,
    "policy analyze": policy_analyze,
    "policy compare": policy_compare,
}
