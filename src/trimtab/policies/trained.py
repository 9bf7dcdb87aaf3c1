"""Trained policies with their open runs; what several of them share is loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.policies.arms import PolicyArm
from trimtab.policies.config import NOT_THE_RESULT, PolicyConfig
from trimtab.policies.networks import Policy
from trimtab.policies.setup import Setup
from trimtab.policies.train import last_checkpoint, load_policy
from trimtab.runs import Run, config_dict, paths_of_run, read_record, read_typed
from trimtab.tasks import TASK_FIELDS

COMMAND = "policy train"


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A trained policy with its open run and its setting."""

    run: Run
    setup: Setup
    policy: Policy

    @property
    def arm(self) -> PolicyArm:
        """The policy as an arm."""
        return PolicyArm(setup=self.setup, policy=self.policy)


def read_policy_config(run: Path) -> PolicyConfig:
    """The config of a run of `policy train`, its directory being where it lies now.

    Raises:
        UserError: there is no run, it is another command's, or it was written by another version.
    """
    record = read_record(run)
    if record["command"] != COMMAND:
        raise UserError(
            f"run {run}", f"it belongs to `{record['command']}`, not `{COMMAND}`", "name a run of `policy train`"
        )
    try:
        config = read_typed(PolicyConfig, record["config"] | paths_of_run(record, ("model", "sae", "data", "found")))
        return replace(config, run=run)
    except UserError as error:
        raise UserError(
            f"run {run}", f"its config is not one of this version ({error})", "use the version that wrote it"
        ) from error


def open_trained(paths: Sequence[Path], stack: ExitStack) -> list[TrainedRun]:
    """Open runs of `policy train` and load what they trained.

    Args:
        paths: the runs.
        stack: closes them.

    Raises:
        UserError: one is no run of `policy train`, holds no checkpoint, or is of another task, other options of it or
            another judge than the first one.
    """
    configs = [read_policy_config(path) for path in paths]
    for path, config in zip(paths[1:], configs[1:], strict=True):
        config.check_same_rewards(path, configs[0])
    for path in paths:
        last_checkpoint(path)
    found: list[TrainedRun] = []
    for path, config in zip(paths, configs, strict=True):
        setup = _setup(config, [one.setup for one in found])
        run = stack.enter_context(Run.open(path, COMMAND, config, ignore_fields=NOT_THE_RESULT, device=config.device))
        found.append(TrainedRun(run=run, setup=setup, policy=load_policy(setup, path)))
    return found


def setting_of(config: PolicyConfig) -> dict[str, Any]:
    """The config but for the seed and what does not change the result."""
    return {name: value for name, value in config_dict(config).items() if name not in (*NOT_THE_RESULT, "seed")}


def _setup(config: PolicyConfig, known: Sequence[Setup]) -> Setup:
    """The setting of a run; what is the same as in an earlier one is not loaded again."""
    for setup in known:
        if setting_of(setup.config) == setting_of(config):
            return replace(setup, config=config, seed=config.seed)
    same = [setup for setup in known if _same(setup.config, config, "model", "dtype", "device", "allow")]
    tasks = [setup.task for setup in same if _same(setup.config, config, *TASK_FIELDS)]
    task = tasks[0] if tasks else config.read_task()
    model = same[0].model if same else config.load_model()
    saes = [setup.dictionary for setup in same if setup.config.sae == config.sae]
    sae = saes[0] if saes else config.load_dictionary(model)
    return Setup.with_parts(config, model, sae, task)


def _same(a: PolicyConfig, b: PolicyConfig, *fields: str) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in fields)
