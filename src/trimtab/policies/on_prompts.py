"""Policies trained on prompts and a reward function: compared with other ways of control, and used to steer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.control.arm import ARM_KINDS, ArmKind
from trimtab.control.arms.static import LIVE_SAMPLE, sample_of_live, used_features
from trimtab.control.comparison import Comparison, compare
from trimtab.control.replicates import Replicate
from trimtab.dictionaries import SAE
from trimtab.dictionaries.base import check_is_dictionary
from trimtab.lm import DecodeConfig, LanguageModel
from trimtab.lm.model import check_is_model
from trimtab.policies.arms import PolicyArm
from trimtab.policies.config import PolicyConfig
from trimtab.policies.setup import Setup
from trimtab.policies.source import PolicySource
from trimtab.policies.train import TrainedPolicy, load_policy, train_in_run
from trimtab.runs import field_types, kept_or_temporary, read_keywords, read_metrics
from trimtab.runs.figures import Curve, Level, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, INTERVAL, Column, Table
from trimtab.steering import SteerResult, steer
from trimtab.tasks import PromptTask, TaskConfig
from trimtab.tasks.prompts import Reward

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

USED, SAMPLE = 32, 96
"""Features that the static arm tries: the policy's most used, and a sample of live ones."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LearnedPolicy(Result):
    """A trained policy with all that it needs to steer."""

    setup: Setup
    trained: TrainedPolicy
    metrics: list[dict[str, Any]]
    """What was logged while it was trained."""
    run: Path | None = None
    """The run's directory; None if none was asked for."""

    def source(self, *, greedy: bool = True) -> PolicySource:
        """The policy as a source of interventions.

        Args:
            greedy: take the most likely action; otherwise actions are drawn.
        """
        return self.setup.source(self.trained.policy, greedy=greedy)

    def steer(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        decoding: DecodeConfig | None = None,
        greedy: bool = True,
        **options: Any,
    ) -> SteerResult:
        """Continue prompts unsteered and under the policy.

        Args:
            prompts: one text, several, or token ids.
            decoding: how tokens are chosen; by default as many as in training.
            greedy: take the policy's most likely action; otherwise actions are drawn.
            options: `chat` (as in training by default), `samples` and `kl`.

        Raises:
            UserError: as `trimtab.steering.steer`.
        """
        decoding = decoding or DecodeConfig(max_new_tokens=self.setup.task.max_new_tokens)
        options = {"chat": self.setup.task.chat, **options}
        return steer(self.setup.model, self.source(greedy=greedy), prompts, decoding=decoding, **options)

    def compare(self, arms: Sequence[str | ArmKind] | None = None, **options: Any) -> Comparison:
        """Put other ways of control beside the policy, on the test prompts.

        Args:
            arms: as `trimtab.control.compare` takes them; all that are registered by default.
            options: its further arguments, such as `equal_kl`.

        Raises:
            UserError: a split has no prompts, or an arm is not known.
        """
        setup, arm = self.setup, PolicyArm(setup=self.setup, policy=self.trained.policy)
        prompts = {
            "train": setup.prompts("train", setup.config.train_items),
            "validation": setup.prompts("validation", setup.config.validation_items),
            "test": setup.prompts("test"),
        }
        answers = Replicate.of(setup, arm, prompts["train"], prompts["validation"]).answers
        candidates: dict[str, Sequence[int]] = {
            "used by the policy": used_features([answers], USED),
            LIVE_SAMPLE: sample_of_live(setup, SAMPLE, setup.seed),
        }
        chosen = tuple(ARM_KINDS) if arms is None else arms
        return compare(setup, prompts, chosen, reference=arm, candidates=candidates, seed=setup.seed, **options)

    def headline(self) -> str:
        t = self.trained
        return (
            f"policy over {self.setup.dictionary.n_features:,} features at {self.setup.site} of "
            f"{self.setup.model.name}: validation reward {t.best_validation_reward:.3f} (iteration "
            f"{t.best_iteration}), unsteered {t.unsteered_validation_reward:.3f}"
        )

    def tables(self) -> dict[str, Table]:
        return {"result": Table(columns=_COLUMNS, rows=[self.trained], caption="; ".join(self.trained.warnings))}

    def to_frame(self, table: str = "") -> pd.DataFrame:
        """What was logged, one row for each logged step; or the table `result`."""
        import pandas as pd

        return super().to_frame(table) if table else pd.DataFrame(self.metrics)

    def draw(self, ax: Axes) -> None:
        """Reward on validation over the training, and that of the unsteered model."""
        name = "validation/reward"
        steps, values = zip(*((line["step"], line[name]) for line in self.metrics if name in line), strict=True)
        levels = [Level("unsteered", self.trained.unsteered_validation_reward)]
        plot_curves(ax, [Curve("policy", steps, values)], "validation reward", levels=levels)


_COLUMNS = [
    Column("validation reward", "best_validation_reward", INTERVAL),
    Column("unsteered", "unsteered_validation_reward", INTERVAL),
    Column("best iteration", "best_iteration", COUNT),
    Column("iterations", "iterations", COUNT),
    Column("rollouts", "rollouts", COUNT),
    Column("seconds", "seconds", ".0f"),
]


_NOT_OPTIONS = {
    "model", "dtype", "device", "sae", "run", "max_new_tokens",
    *TaskConfig.__dataclass_fields__,
}  # fmt: skip
"""Fields of `PolicyConfig` that objects say."""


def train_policy(
    model: LanguageModel,
    dictionary: SAE,
    prompts: Sequence[str] | Mapping[str, Sequence[str]],
    reward: Reward,
    *,
    chat: bool = False,
    max_new_tokens: int = 20,
    run: Path | str | None = None,
    **options: Any,
) -> LearnedPolicy:
    """Train a policy that picks a feature at each token, on prompts and a reward function.

    Args:
        model: the model.
        dictionary: whose features it picks from.
        prompts: texts, of which 60% train, 20% choose the checkpoint and 20% are for `compare`; or those of each
            split (`train`, `validation`, `test`).
        reward: called with a prompt and an answer; any finite number, more is better.
        chat: put prompts into the model's chat template, as user turns.
        max_new_tokens: how long an answer may be.
        run: directory to keep checkpoints and metrics in; the same call again goes on from there, or gives back what
            it holds. Other prompts, or a reward with other source text, are refused; values that a reward refers to
            are not compared.
        options: fields of `PolicyConfig`, such as `dose`, `mask`, `iterations`, `samples`, `ppo` and `seed`.

    Raises:
        UserError: a value is not allowed, the dictionary does not fit, a split has no prompts, a reward is not finite.
    """
    check_is_model(model)
    check_is_dictionary(dictionary)
    known = {name: kind for name, kind in field_types(PolicyConfig).items() if name not in _NOT_OPTIONS}
    options = read_keywords(options, known, train_policy)
    task = PromptTask(prompts, reward, chat=chat, max_new_tokens=max_new_tokens)
    named = {"model": model.name, "sae": dictionary.name, "device": str(model.device)}
    with kept_or_temporary(run) as path:
        config = PolicyConfig(task=task.name, max_new_tokens=max_new_tokens, run=path, **named, **options)
        setup = Setup.with_parts(config, model, dictionary, task)
        summary = train_in_run(config, setup)
        trained = TrainedPolicy(policy=load_policy(setup, path), **summary.results)
        return LearnedPolicy(
            setup=setup, trained=trained, metrics=read_metrics(path), run=None if run is None else path
        )
