"""`trimtab policy train`: rollouts, updates, validation and checkpoints, with exact resumption.

Metrics have CleanRL's names. Every random draw is keyed by the seed and by what it is for, so that a checkpoint needs
no random state: items and minibatches of an iteration follow from its number, actions from the rollout's own keys.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.control.task_prompts import TaskPrompts
from trimtab.errors import UserError
from trimtab.policies.config import NOT_THE_RESULT, PolicyConfig
from trimtab.policies.file_names import ANALYSIS_DIRECTORY, EVALUATION_FILE, ITEMS_FILE
from trimtab.policies.headroom.training import training_headroom
from trimtab.policies.networks import Policy
from trimtab.policies.ppo import Learner, UpdateReport
from trimtab.policies.rollout import Rollouts, roll_out
from trimtab.policies.setup import Setup
from trimtab.policies.source import Decisions
from trimtab.runs import Meter, Run
from trimtab.runs.atomic import remove_partial_files
from trimtab.steering.trace import EDITS_FILE, TOKENS_FILE
from trimtab.training.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint

CHECKPOINTS = "checkpoints"
UNTRAINED = "  no checkpoint beat the untrained policy on validation, so that one is kept; try more iterations"
OF_THE_POLICY = (EVALUATION_FILE, ITEMS_FILE, TOKENS_FILE, EDITS_FILE, ANALYSIS_DIRECTORY)
"""What evaluations and analyses leave in a run."""
NO_OTHER = 1e-6
"""Rewards that differ by less are the same."""
LOG_RATIO_LIMIT = 1e-5
"""Largest difference that rollout and update may show in an action's log-probability before the first gradient step."""


@dataclass(frozen=True, kw_only=True)
class TrainedPolicy:
    """What training came to, on validation items."""

    policy: Policy
    """The best checkpoint by validation reward."""
    best_iteration: int
    best_validation_reward: float
    unsteered_validation_reward: float
    iterations: int
    rollouts: int
    seconds: float
    """Of this call."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """What `trimtab policy train` prints and keeps in its run."""

    run: Path
    task: str
    results: dict[str, Any]
    """The fields of `TrainedPolicy` but the policy itself."""
    resumed: bool
    """Whether the run was done before."""

    def render(self) -> str:
        """The summary in a few lines."""
        r = self.results
        lines = [
            f"{self.run}{' (done before)' if self.resumed else ''}",
            f"  {r['iterations']} iterations, {r['rollouts']:,} rollouts, {r['seconds']:.0f} s",
            f"  validation reward on {self.task}: {r['best_validation_reward']:.3f} at iteration {r['best_iteration']} "
            f"(chosen there), unsteered {r['unsteered_validation_reward']:.3f}",
            *([UNTRAINED] if r["best_iteration"] == 0 and r["iterations"] else []),
            *(f"  {warning}" for warning in r["warnings"]),
            f"  next: trimtab policy evaluate {self.run}; or train on, by --run {self.run} and more --iterations",
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The summary as plain values."""
        return {"run": str(self.run), "task": self.task, "resumed": self.resumed, **self.results}


def run_policy_train(config: PolicyConfig) -> TrainingSummary:
    """What `trimtab policy train` does; see `train_in_run`."""
    return train_in_run(config, lambda: Setup.of(config))


def train_in_run(config: PolicyConfig, setup: Setup | Callable[[], Setup]) -> TrainingSummary:
    """Train a policy in its run's directory, or go on from the last checkpoint there.

    A run may be given more iterations than it had. It goes on from its last checkpoint, the learning rate falling as if
    so many had been asked for from there on; what was evaluated and analysed before is moved to a directory of its own.

    Args:
        config: how.
        setup: what the config names, or what gives it, which is not called where everything is done.

    Raises:
        UserError: anything that the user named is wrong, a reward that is not finite, a run of another config, or of
            other prompts than a setup that is given.
    """
    with Run.open(
        config.directory(), "policy train", config, seeds=[config.seed], device=config.device,
        ignore_fields=(*NOT_THE_RESULT, "iterations"),
    ) as run:  # fmt: skip
        if config.iterations > run.config["iterations"]:
            _set_aside(run, f"iterations-{run.config['iterations']}")
        run.extend("iterations", config.iterations)
        resumed = run.done
        if resumed and isinstance(setup, Setup):
            record_items(setup, run)
        if not resumed:
            trained = fit(setup if isinstance(setup, Setup) else setup(), run)
            run.finish({name: value for name, value in vars(trained).items() if name != "policy"})
        results: Any = run.results
        return TrainingSummary(run=run.path, task=config.task, results=dict(results), resumed=resumed)


def _set_aside(run: Run, name: str) -> None:
    """Move what evaluations and analyses found of the policy so far."""
    found = [run.file(name) for name in OF_THE_POLICY if run.file(name).exists()]
    if not found:
        return
    run.file(name).mkdir(exist_ok=True)
    for path in found:
        path.replace(run.file(name) / path.name)
    run.record(trace=None)
    print(f"trimtab: what was found of the policy so far is in {run.file(name)}", file=sys.stderr)


def record_items(setup: Setup, run: Run) -> tuple[TaskPrompts, TaskPrompts]:
    """Training and validation prompts, once the run has recorded what it is of.

    Raises:
        UserError: the run was of other ones, or of another model, dictionary or reward.
    """
    config = setup.config
    train = setup.prompts("train", config.train_items)
    validation = setup.prompts("validation", config.validation_items)
    run.record(
        hashes={
            "model": setup.model.fingerprint,
            "dictionary": setup.dictionary.fingerprint,
            "data": hashlib.sha256((train.digest() + validation.digest()).encode()).hexdigest(),
            **setup.task.hashes,
        },
        splits={"train": [i.id for i in train.items], "validation": [i.id for i in validation.items]},
        hides_text=setup.task.hides_text,
        chat=setup.task.chat,
    )
    return train, validation


def fit(setup: Setup, run: Run) -> TrainedPolicy:
    """Train in an open run; the caller sees to everything else that the run should hold and finishes it."""
    train, validation = record_items(setup, run)
    warnings = training_headroom(setup, run, validation)
    _warn(warnings)
    trained = _Trainer(setup, run, train, validation).run_all()
    return replace(trained, warnings=tuple(dict.fromkeys((*trained.warnings, *warnings))))


def fresh_policy(setup: Setup) -> Policy:
    """An untrained policy of the config's shape and seed."""
    config, rows = setup.config, setup.dictionary.directions
    return Policy.build(rows, hidden=config.hidden, head=config.head, seed=config.seed).to(setup.model.device)


class _Trainer:
    def __init__(self, setup: Setup, run: Run, train: TaskPrompts, validation: TaskPrompts) -> None:
        config = setup.config
        self.setup, self.config, self.run = setup, config, run
        self.train, self.validation = train, validation
        self.batch = min(config.items_per_iteration, len(train))
        self.policy = fresh_policy(setup)
        self.learner = Learner(self.policy, config.ppo)
        self.iteration = 0
        self.best: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {"best_iteration": -1, "best_reward": -math.inf}
        self._load()

    def run_all(self) -> TrainedPolicy:
        began = time.perf_counter()
        if "warnings" not in self.facts:
            self._before_training()
        with Meter("training the policy", self.config.iterations, done=self.iteration) as meter:
            while self.iteration < self.config.iterations:
                meter.describe(f"training the policy: {_in_short(self._iterate(meter))}")
        policy = self.policy
        policy.load_state_dict(self.best)
        return TrainedPolicy(
            policy=policy,
            best_iteration=self.facts["best_iteration"],
            best_validation_reward=self.facts["best_reward"],
            unsteered_validation_reward=self.facts["unsteered_reward"],
            iterations=self.iteration,
            rollouts=self.iteration * self.batch * self.config.samples,
            seconds=time.perf_counter() - began,
            warnings=tuple(self.facts["warnings"]),
        )

    def _before_training(self) -> None:
        """Score the model unsteered, warn where nothing can be gained, show the normaliser what the policy meets on
        training items, and set how likely no edit is at the start."""
        self.facts["warnings"] = []
        which = np.random.default_rng([self.config.seed, 2]).permutation(len(self.train))[:256].tolist()
        source = self.setup.source(self.policy)
        with Meter("before training, unsteered answers", 2 * len(self.validation) + len(which)) as meter:
            unsteered = self._roll_out(None, self.validation, meter.advance)
            self.facts["unsteered_reward"] = unsteered.mean_reward
            best = self.setup.task.best_reward
            if best is not None and min(outcome.reward for outcome in unsteered.outcomes) >= best:
                self._warn("no headroom: the unsteered model already gets every validation item right")
            meter.describe("before training, answers on training items")
            self._roll_out(source, self.train.take(which), meter.advance)
            decisions = source.decisions
            self.policy.normaliser.show(decisions.observation[decisions.valid])
            if self.config.initial_no_edit:
                allowed = float(decisions.n_allowed[decisions.valid].float().mean())
                self.policy.actor.lean_to_no_edit(self.config.initial_no_edit, max(allowed, 1.0))
            meter.describe("before training, answers on validation items")
            self._validate(meter.advance)
        self._save()

    def _iterate(self, meter: Meter) -> dict[str, Any]:
        """One batch and what comes of it; its metrics. Each answer is its share of a step of the meter."""
        config, k = self.config, self.iteration
        which = np.random.default_rng([config.seed, 0, k]).choice(len(self.train), self.batch, replace=False)
        source = self.setup.source(self.policy)
        rollouts = self._roll_out(
            source,
            self.train.take(which.tolist()),
            lambda rows: meter.advance(rows / (self.batch * config.samples)),
            repeats=config.samples,
            first_sample=(k + 1) * config.items_per_iteration,
            kl_penalty=config.kl_penalty,
        )
        decisions = source.decisions
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([config.seed, 1, k]).generate_state(1)[0]))
        began = time.perf_counter()
        report = self.learner.update(
            decisions, rollouts.reward, generator=generator, share_left=1 - k / config.iterations
        )
        if report.max_abs_log_ratio > LOG_RATIO_LIMIT:
            raise RuntimeError(
                f"the update's log-probabilities differ from the rollout's by {report.max_abs_log_ratio:.2g}, "
                f"more than {LOG_RATIO_LIMIT:.0e}"
            )
        self.policy.normaliser.show(decisions.observation[decisions.valid])
        self.iteration += 1
        metrics = self._log(rollouts, decisions, report, time.perf_counter() - began)
        if self.iteration == 1:
            self._warn_of_no_effect(which.tolist(), rollouts)
        last = self.iteration == config.iterations
        if self.iteration % config.validate_every == 0 or last:
            self._validate()
        if self.iteration % config.checkpoint_every == 0 or last:
            self._save()
        return metrics

    def _warn_of_no_effect(self, which: Sequence[int], rollouts: Rollouts) -> None:
        """Warn if no rollout of the first iteration earned another reward than the unsteered model on its item."""
        unsteered = self._roll_out(None, self.train.take(which))
        plain = np.repeat([outcome.reward for outcome in unsteered.outcomes], self.config.samples)
        steered = np.array([outcome.reward for outcome in rollouts.outcomes])
        if not (np.abs(steered - plain) > NO_OTHER).any():
            self._warn(
                f"no effect: in the first iteration none of {len(steered):,} rollouts of {len(which)} items earned "
                "another reward than the unsteered model; try another dose, mask or site"
            )

    def _warn(self, warning: str) -> None:
        self.facts["warnings"] = [*self.facts["warnings"], warning]
        _warn([warning])

    def _roll_out(
        self, source: Any, prompts: TaskPrompts, progress: Callable[[int], None] | None = None, **options: Any
    ) -> Rollouts:
        config = self.config
        return roll_out(
            self.setup.model, source, prompts, seed=config.seed, temperature=config.temperature,
            batch_size=config.batch_size, prompt_cache=self.setup.prompt_cache, progress=progress, **options,
        )  # fmt: skip

    def _validate(self, progress: Callable[[int], None] | None = None) -> None:
        """Greedy reward on validation; the best policy so far is kept, the earliest at ties."""
        source = self.setup.source(self.policy, greedy=True)
        reward = self._roll_out(source, self.validation, progress).mean_reward
        found = {f"validation/{name}": value for name, value in self._choices(source.decisions).items()}
        self.run.log({"validation/reward": reward, **found}, step=self.iteration)
        if reward > self.facts["best_reward"]:
            self.best = {name: t.detach().clone() for name, t in self.policy.state_dict().items()}
            self.facts |= {"best_reward": reward, "best_iteration": self.iteration}

    def _log(self, rollouts: Rollouts, decisions: Decisions, report: UpdateReport, seconds: float) -> dict[str, Any]:
        metrics: dict[str, Any] = {
            "charts/episodic_return": float(rollouts.reward.sum(1).mean()),
            "charts/reward": rollouts.mean_reward,
            "charts/malformed": float(np.mean([o.malformed for o in rollouts.outcomes])),
            "charts/tokens_per_second": rollouts.tokens_per_second,
            "charts/update_seconds": seconds,
            "charts/learning_rate": self.learner.optimiser.param_groups[0]["lr"],
            **{f"losses/{name}": value for name, value in report._asdict().items()},
            **{f"policy/{name}": value for name, value in self._choices(decisions).items()},
            "policy/kl_unsteered": None if rollouts.kl is None else float(rollouts.kl.sum(1).mean()),
        }
        self.run.log(metrics, step=self.iteration)
        return metrics

    def _choices(self, decisions: Decisions) -> dict[str, float]:
        """How widely the policy chose, among how many, and how often nothing."""
        valid = decisions.valid
        entropy = float(decisions.entropy[valid].mean())
        return {
            "entropy": entropy,
            "effective_features": math.exp(entropy),
            "allowed": float(decisions.n_allowed[valid].float().mean()),
            "no_edit_share": float((decisions.action[valid] == self.setup.dictionary.n_features).float().mean()),
        }

    def _save(self) -> None:
        tensors = {f"policy.{name}": t for name, t in self.policy.state_dict().items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        for i, state in self.learner.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
        write_checkpoint(self.run.file(CHECKPOINTS), Checkpoint(self.iteration, tensors, self.facts))

    def _load(self) -> None:
        directory = self.run.file(CHECKPOINTS)
        directory.mkdir(exist_ok=True)
        remove_partial_files(directory)
        checkpoint = latest_checkpoint(directory)
        if checkpoint is None:
            self.run.drop_metrics_after(-1)
            return
        self.policy.load_state_dict(_below("policy", checkpoint.tensors))
        self.best = _below("best", checkpoint.tensors)
        moments = _below("adam", checkpoint.tensors)
        state = {int(index): _below(index, moments) for index in {name.partition(".")[0] for name in moments}}
        whole = self.learner.optimiser.state_dict()
        self.learner.optimiser.load_state_dict({**whole, "state": state})
        self.facts = dict(checkpoint.facts)
        self.iteration = checkpoint.step
        self.run.drop_metrics_after(self.iteration)


def _in_short(metrics: Mapping[str, Any]) -> str:
    """An iteration's metrics in the words of a progress bar; those that are not finite are left out."""
    shown = (
        ("reward {:.2f}", "charts/reward"),
        ("entropy {:.1f}", "policy/entropy"),
        ("approx KL {:.3f}", "losses/approx_kl"),
        ("EV {:.2f}", "losses/explained_variance"),
        ("exp(H) {:,.1f}", "policy/effective_features"),
        ("{:,.0f} tokens/s", "charts/tokens_per_second"),
    )
    return ", ".join(words.format(metrics[name]) for words, name in shown if math.isfinite(metrics[name]))


def _warn(warnings: Sequence[str]) -> None:
    """Say on stderr, before time is spent on training, what speaks against it."""
    for warning in warnings:
        print(f"trimtab: warning: {warning}", file=sys.stderr)


def _below(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names begin with a part's, without it."""
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


def last_checkpoint(run: Path) -> Checkpoint:
    """The last checkpoint of a run of `policy train`, which holds its best policy.

    Raises:
        UserError: there is none.
    """
    checkpoint = latest_checkpoint(run / CHECKPOINTS)
    if checkpoint is None:
        raise UserError(f"run {run}", "it holds no checkpoint", "train the policy first")
    return checkpoint


def load_policy(setup: Setup, run: Path) -> Policy:
    """The best policy of a run of `policy train`.

    Raises:
        UserError: the run has no checkpoint, or is of another SAE.
    """
    policy = fresh_policy(setup)
    policy.load_state_dict(_below("best", last_checkpoint(run).tensors))
    return policy
