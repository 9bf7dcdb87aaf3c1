"""How a policy is trained: what it steers, on which task, under which mask and dose, and how it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.control.masks import MaskKind
from trimtab.dictionaries import DictionaryConfig
from trimtab.errors import UserError
from trimtab.policies.file_names import JUDGE_FILE
from trimtab.policies.networks import Head
from trimtab.policies.ppo import PPOConfig
from trimtab.runs import LEFT_OUT_AT_DEFAULT, check_choices, check_least, check_values, config_directory
from trimtab.steering import Unit, check_doses
from trimtab.tasks import TaskConfig


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(TaskConfig, DictionaryConfig):
    """Train a policy that picks a feature at each token."""

    needs = ("decode", "prefix")

    site: str | None = None
    """Where to steer; the site that the SAE names by default, and no other where it names one."""
    mask: MaskKind = "accumulated"
    """Features that may be chosen: `none` for all, `current` for those firing at the token, `accumulated` for those
    that fired so far in the sample, `top-confidence` for those highest in delta-confidence, `found` for those that
    --found names or, without it, that promise the task's training items most reward by the gradient."""
    mask_features: int = 256
    """Features of the masks `top-confidence` and `found`, at most."""
    found: Path | None = field(default=None, metadata=LEFT_OUT_AT_DEFAULT)
    """A saved steering or a run of find, whose features the mask `found` allows."""
    dose: float = 0.5
    """Dose of every edit, in `unit`."""
    unit: Unit = "relative"
    """What the dose is a multiple of."""
    train_items: int | None = None
    """Use only this many training items."""
    validation_items: int | None = 256
    """Use only this many validation items."""
    headroom_items: int | None = None
    """Validation items on which headroom is measured before training; if not given, 8 where answers are one token and
    none where they are longer. 0 skips it."""
    iterations: int = 60
    """Batches of rollouts, each followed by an update."""
    items_per_iteration: int = 32
    """Items of a batch."""
    samples: int = 8
    """Rollouts of each item of a batch."""
    batch_size: int = 128
    """Rows decoded together."""
    temperature: float = 0.0
    """Of tokens; actions are drawn from the policy in any case."""
    kl_penalty: float = 0.0
    """Reward lost per nat of divergence from the unsteered model."""
    hidden: tuple[int, ...] = (256,)
    """Units of the hidden layers of actor and critic."""
    head: Head = "auto"
    """Whether the actor has weights per feature (`full`) or a query against decoder rows (`decoder`)."""
    initial_no_edit: float = 0.25
    """How likely no edit is before training; 0 for as likely as each feature. Where most features spoil an answer, a
    policy that starts by editing always learns first of all not to."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """How it learns."""
    validate_every: int = 10
    """Iterations between evaluations on validation; the best checkpoint is the one that is kept."""
    checkpoint_every: int = 5
    """Iterations between checkpoints."""
    seed: int = 0
    """Of weights, actions, items and minibatches."""
    prompt_cache_gb: float = 2.0
    """Memory for prompts' keys and values; 0 keeps none."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config. The same command resumes it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_doses(self.dose)
        check_least(
            self, 1, "iterations", "items_per_iteration", "samples", "batch_size", "validate_every",
            "checkpoint_every", "mask_features", "train_items", "validation_items", "hidden",
        )  # fmt: skip
        check_values(
            self, "finite and at least 0", lambda value: 0 <= value < math.inf, "kl_penalty", "temperature",
            "prompt_cache_gb",
        )  # fmt: skip
        check_values(self, "from 0 to below 1", lambda value: 0 <= value < 1, "initial_no_edit")
        if self.found is not None and self.mask != "found":
            raise UserError(f"--found {self.found}", f"the mask is {self.mask}", "give --mask found, too")
        if self.headroom_items is not None and (self.headroom_items < 0 or self.headroom_items == 1):
            raise UserError(
                f"headroom_items {self.headroom_items}", "there is too little to compare", "use 0, or 2 and more"
            )

    def directory(self) -> Path:
        """Where the run goes: the same config always finds its own run."""
        return self.run or config_directory(f"policy-{self.task.replace(':', '-')}", self, ignore=NOT_THE_RESULT)

    @property
    def transcript(self) -> Path:
        """File of the run that keeps the replies of a judge behind an endpoint."""
        return self.directory() / JUDGE_FILE


NOT_THE_RESULT = ("run", "checkpoint_every", "prompt_cache_gb", "headroom_items")
"""Fields that may differ between openings of one run."""
