"""How trained policies are evaluated: which controls stand beside them, and how much is spent on each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trimtab.control.adapter import AdapterPositions
from trimtab.control.arm import find_kind
from trimtab.errors import UserError
from trimtab.policies.arms import control_names
from trimtab.policies.headroom.candidates import COUNT
from trimtab.runs import check_choices, check_least, check_values


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Show trained policies beside their controls."""

    run: tuple[Path, ...] = ()
    """Runs of `policy train`; those that differ in their seed alone are seeds of one setting."""
    split: str = "test"
    """Split to report on; everything is chosen on validation."""
    skip: int = 0
    """Leave out as many items first, such as those that earlier evaluations looked at."""
    items: int | None = None
    """Use only this many items of the split."""
    controls: tuple[str, ...] = field(default_factory=control_names)
    """Controls beside the policy; one of your own as module:Class."""
    equal_kl: bool = True
    """Show controls at equal divergence from the unsteered model, too."""
    kl_items: int = 64
    """Validation items by which doses are scaled to equal divergence."""
    kl_tolerance: float = 0.05
    """Relative difference of mean divergences that counts as equal."""
    feature: tuple[int, ...] = ()
    """Static features to try besides the policy's own and a sample."""
    used: int = 32
    """How many of the policy's most used features to try as the static one."""
    sample: int = 96
    """How many random live features to try as the static one."""
    headroom_items: int = 0
    """Validation items on which to try every feature for the best static ones."""
    headroom_features: int = COUNT
    """Features to try there where answers are longer than one token: the highest in delta-confidence."""
    finalists: int = 16
    """Static features that are tried on all validation items and at all doses."""
    dose_factor: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Doses of the static feature that are tried, as multiples of the policy's."""
    draws: int = 3
    """Repetitions of the random and the shuffled control."""
    train_items: int = 512
    """Training items for controls that are fitted."""
    instruction: tuple[str, ...] = ()
    """Instructions to choose from; a few written for the task by default."""
    vector_steps: int = 100
    """Steps of training the vector."""
    lora_steps: int = 100
    """Steps of training the LoRA."""
    lora_rank: int = 8
    """Rank of the LoRA."""
    lora_positions: AdapterPositions = "generated"
    """Where the LoRA acts: where the policy may edit (`generated`), or on prompts too (`all`)."""
    every_order: bool = True
    """Where an item's options have an order: play the main arms under every cyclic order, too, and report what is known
    (right under all of them)."""
    companions: bool = True
    """Show the main arms on the tasks that must stand beside this one."""
    trace: bool = True
    """Write the trace of the policy's arm, with the effect of every edit."""
    keep_texts: bool = False
    """Keep the answers to harmful prompts, too. Without it, files hold no token or text of a task about refusals."""
    seed: int = 0
    """Of samples of features and of the bootstrap."""
    out: Path | None = None
    """Directory for the results; the first run's own by default."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("policy evaluate", "there is no run to evaluate", "name a run of `policy train`")
        check_choices(self)
        for name in self.controls:
            find_kind(name)
        check_least(self, 1, "kl_items", "finalists", "draws", "train_items", "lora_rank", "items", "headroom_features")
        check_least(self, 0, "skip", "used", "sample", "headroom_items", "vector_steps", "lora_steps")
        check_values(self, "between 0 and 1", lambda value: 0 < value < 1, "kl_tolerance")
        if not self.dose_factor or any(not 0 < factor < 1000 for factor in self.dose_factor):
            raise UserError(f"dose_factor {self.dose_factor}", "factors are above 0 and below 1000", "use 0.5 1 2")
