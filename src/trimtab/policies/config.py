"""How a policy is trained: what it steers, on which task, under which mask and dose, and how it learns."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.control.masks import MASKS, MaskKind
from trimtab.errors import UserError
from trimtab.policies.files import JUDGE_FILE
from trimtab.policies.networks import Head
from trimtab.policies.ppo import PPOConfig
from trimtab.runs import LEFT_OUT_AT_DEFAULT, config_dict
from trimtab.steering import UNITS, Unit, check_doses


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Train a policy that picks a feature at each token."""

    task: str
    """Name of the task, or module:Class of your own."""
    data: Path | None = None
    """Directory of the official files of the task."""
    task_option: tuple[str, ...] = field(default=(), metadata=LEFT_OUT_AT_DEFAULT)
    """Options of the task's loader, each NAME=VALUE: `shots=5`, `subjects=anatomy,virology`, `harmless=1`."""
    judge: str | None = field(default=None, metadata=LEFT_OUT_AT_DEFAULT)
    """What reads answers to harmful prompts: `rules`, `classifier:PATH` or `endpoint:MODEL@URL`; the task's own
    default, the rules, if not given."""
    judge_option: tuple[str, ...] = field(default=(), metadata=LEFT_OUT_AT_DEFAULT)
    """Options of the judge, each NAME=VALUE: `threshold=0.7` of a classifier, `key_variable=MY_KEY` of an endpoint."""
    model: str = "smollm2-135m-instruct"
    """Hub id, directory, GGUF file or catalogue name."""
    sae: str = "default"
    """Directory of the SAE, or a shipped one's name."""
    site: str | None = None
    """Where to steer; the site that the SAE names by default, and no other where it names one."""
    mask: MaskKind = "accumulated"
    """Features that may be chosen: `none` for all, `current` for those firing at the token, `accumulated` for those
    that fired so far in the sample, `top-confidence` for those highest in delta-confidence."""
    mask_features: int = 256
    """Features of the mask `top-confidence`."""
    dose: float = 0.5
    """Dose of every edit, in `unit`."""
    unit: Unit = "relative"
    """What the dose is a multiple of."""
    options_only: bool = False
    """Decode among the tokens of the options only, where a task has options."""
    max_new_tokens: int | None = None
    """Tokens to decode per item; the task's own if not given."""
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
    repeats: int = 8
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
    dtype: str = "float32"
    """What the model computes in."""
    device: str = "cpu"
    """Where to compute."""
    prompt_cache_gb: float = 2.0
    """Memory for prompts' keys and values; 0 keeps none."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config. The same command resumes it."""

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise UserError(f"mask {self.mask!r}", f"there is {', '.join(MASKS)}", "choose one of them")
        if self.unit not in UNITS:
            raise UserError(f"unit {self.unit!r}", f"there is {', '.join(UNITS)}", "choose one of them")
        check_doses(self.dose)
        positive = (
            "iterations", "items_per_iteration", "repeats", "batch_size", "validate_every", "checkpoint_every",
            "mask_features",
        )  # fmt: skip
        optional = ("max_new_tokens", "train_items", "validation_items")
        for name in (*positive, *(o for o in optional if getattr(self, o) is not None)):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}", "it must be at least 1", "raise it")
        for name in ("kl_penalty", "temperature", "prompt_cache_gb"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} {getattr(self, name)}", "it must not be negative", "set it to 0 or more")
        if self.headroom_items is not None and (self.headroom_items < 0 or self.headroom_items == 1):
            raise UserError(
                f"headroom_items {self.headroom_items}", "there is too little to compare", "use 0, or 2 and more"
            )
        if not 0 <= self.initial_no_edit < 1:
            raise UserError(f"initial_no_edit {self.initial_no_edit}", "it must be from 0 to below 1", "use 0.25")
        if any(width < 1 for width in self.hidden):
            raise UserError(f"hidden {self.hidden}", "every layer needs at least one unit", "change it")

    def directory(self) -> Path:
        """Where the run goes: the same config always finds its own run."""
        if self.run is not None:
            return self.run
        plain = {name: value for name, value in config_dict(self).items() if name not in NOT_THE_RESULT}
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        return Path("runs") / f"policy-{self.task.replace(':', '-')}-{digest[:8]}"

    @property
    def transcript(self) -> Path:
        """File of the run that keeps the replies of a judge behind an endpoint."""
        return self.directory() / JUDGE_FILE


NOT_THE_RESULT = ("run", "checkpoint_every", "prompt_cache_gb", "headroom_items")
"""Fields that may differ between openings of one run."""
