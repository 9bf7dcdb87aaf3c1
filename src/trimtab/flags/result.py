"""What a finetuning with flags gives: the model, its flags, and what they say of held-out responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.flags.config import FlagTraining
from trimtab.flags.dividing import HoldoutKind
from trimtab.flags.files import save_flags
from trimtab.flags.measuring import FlagMeasures
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.lm.loading import DTYPES
from trimtab.runs import json_safe
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.shown import Shown
from trimtab.runs.tables import INTERVAL, SHARE, Column, Table
from trimtab.stats import number_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FIGURES = {
    "flag_accuracy": (
        "Flag accuracy on the examples of steps that are not forced (0.5 is chance)",
        "share",
    ),
    "flag_loss": ("The flags' loss in steps that are not forced", "loss"),
    "cross_entropy": ("Cross-entropy of the responses, forced steps included", "nats per token"),
}
"""What a page draws of the metrics: a caption and the name of the vertical axis."""


@dataclass(frozen=True, kw_only=True, repr=False)
class FlagTrainingResult(Result):
    """Numbers of a finetuning."""

    model: str
    """What it was finetuned from."""
    curriculum: str
    """Its name; `own` for one of one's own."""
    adapt: str
    """`full` for all weights, `lora` for an adapter."""
    trained_weights: int
    """How many numbers were trained."""
    steps: int
    forced_steps: int
    tokens: int
    """Of the examples that were trained on, each as often as it was; prompts included."""
    seed: int
    examples: int
    """Trained on."""
    left_out: int
    """Neither trained on nor held out: their prompt is held out and their document is not, or the other way round."""
    measured_on: HoldoutKind
    chat: bool
    """Whether examples were in the model's chat template."""
    before: FlagMeasures
    """The model as it was, read at the places of the flags."""
    after: FlagMeasures

    def headline(self) -> str:
        accuracy, before = (number_text(each.accuracy, INTERVAL) for each in (self.after, self.before))
        nats, nats_before = (number_text(each.cross_entropy, INTERVAL) for each in (self.after, self.before))
        lora = "" if self.adapt == "full" else f", LoRA of {self.trained_weights:,} weights"
        dims = sum(len(one.dims) for one in self.after.concepts)
        apart = "whose prompt is held out and document is not, or the other way round"
        left_out = f"; {self.left_out:,} examples left out, {apart}" if self.left_out else ""
        return (
            f"{len(self.after.concepts)} flags in {dims} dimensions, curriculum {self.curriculum}, "
            f"{self.steps} steps ({self.forced_steps} forced){lora}: flag accuracy {accuracy} (0.5 is chance; "
            f"before {before}), cross-entropy {nats} (before {nats_before}) "
            f"on {self.measured_on} (n = {self.after.examples}){left_out}"
        )

    def tables(self) -> dict[str, Table]:
        columns = [
            Column("concept", "concept", whole=True),
            Column("dimensions", lambda row: ", ".join(map(str, row.dims)), spare=1),
            Column("reads on where on", "on", SHARE),
            Column("reads off where off", "off", SHARE),
        ]
        return {"concepts": Table(columns=columns, rows=self.after.concepts)}

    def shown(self, metrics: Sequence[Mapping[str, Any]]) -> Shown:
        """The section of a page: line, table, and what was logged as curves."""
        figures = {
            caption: partial(draw_metric, metrics, name, self.curriculum)
            for name, (caption, _) in FIGURES.items()
            if any(line[name] is not None for line in metrics)
        }
        return Shown.of("Finetuning", self, figures)


def draw_metric(metrics: Sequence[Mapping[str, Any]], name: str, label: str, ax: Axes) -> None:
    """One of `FIGURES` over the steps; steps that do not have it are left out."""
    points = [(line["step"], line[name]) for line in metrics if line[name] is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    plot_curves(ax, [Curve(label, steps, values)], FIGURES[name][1], steps="step")


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainedFlags(Result):
    """A model with flags."""

    result: FlagTrainingResult
    model: LanguageModel
    flags: FlagSpec
    config: FlagTraining
    """How it was finetuned."""
    data: str
    """Hash of the examples, trained on and held out."""
    metrics: list[dict[str, Any]]
    """What was logged while it was finetuned."""
    run: Path | None
    """The run's directory; None if none was asked for."""
    resumed: bool = False
    """Whether the run was done before."""
    adapter: Any = None
    """For LoRA, the `PeftModel` around the model."""

    def save(self, path: Path | str) -> Path:
        """Save model, tokenizer and flags, or the adapter and the flags, in a new directory.

        Raises:
            UserError: as `save_flags` does.
        """
        dtype = DTYPES[self.config.save_dtype]
        return save_flags(self.model, self.flags, path, self.result, adapter=self.adapter, dtype=dtype)

    def headline(self) -> str:
        return self.result.headline()

    def tables(self) -> dict[str, Table]:
        return self.result.tables()

    def to_frame(self, table: str = "") -> pd.DataFrame:
        """What was logged, one row for each logged step; or the table `concepts`."""
        import pandas as pd

        return super().to_frame(table) if table else pd.DataFrame(self.metrics)

    def draw(self, ax: Axes) -> None:
        """Flag accuracy over the finetuning, where steps were not forced."""
        draw_metric(self.metrics, "flag_accuracy", self.result.curriculum, ax)

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain values."""
        return {**json_safe(self.result), "run": str(self.run), "resumed": self.resumed}
