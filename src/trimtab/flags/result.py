"""What a finetuning with flags gives: the model, its flags, and what they say of held-out responses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.flags.files import save_flags
from trimtab.flags.measuring import FlagMeasures
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.runs import json_safe
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import INTERVAL, SHARE, Column, Table
from trimtab.stats import number_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class FlagTrainingResult:
    """Numbers of a finetuning."""

    curriculum: str
    """Its name; `own` for one of one's own."""
    steps: int
    forced_steps: int
    seed: int
    examples: int
    """Trained on."""
    heldout: bool
    """Whether the measures are of held-out examples; else of those trained on."""
    before: FlagMeasures
    """The model as it was, read at the places of the flags."""
    after: FlagMeasures


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainedFlags(Result):
    """A model with flags."""

    result: FlagTrainingResult
    model: LanguageModel
    flags: FlagSpec
    metrics: list[dict[str, Any]]
    """What was logged while it was finetuned."""
    run: Path | None
    """The run's directory; None if none was asked for."""
    resumed: bool = False
    """Whether the run was done before."""

    def save(self, path: Path | str) -> Path:
        """Save model, tokenizer and flags in a new directory. Raises a `UserError` as `save_flags` does."""
        return save_flags(self.model, self.flags, path, self.result)

    def headline(self) -> str:
        r = self.result
        where = "held-out" if r.heldout else "training"
        accuracy, before = (number_text(each.accuracy, INTERVAL) for each in (r.after, r.before))
        nats, nats_before = (number_text(each.cross_entropy, INTERVAL) for each in (r.after, r.before))
        return (
            f"{len(self.flags.concepts)} flags in {len(self.flags.flat_dims)} dimensions, curriculum {r.curriculum}, "
            f"{r.steps} steps ({r.forced_steps} forced): flag accuracy {accuracy} (before {before}), cross-entropy "
            f"{nats} (before {nats_before}) on {r.after.examples} {where} examples"
        )

    def tables(self) -> dict[str, Table]:
        columns = [
            Column("concept", "concept", whole=True),
            Column("dimensions", lambda row: ", ".join(map(str, row.dims)), spare=1),
            Column("reads on where on", "on", SHARE),
            Column("reads off where off", "off", SHARE),
        ]
        return {"concepts": Table(columns=columns, rows=self.result.after.concepts)}

    def to_frame(self, table: str = "") -> pd.DataFrame:
        """What was logged, one row for each logged step; or the table `concepts`."""
        import pandas as pd

        return super().to_frame(table) if table else pd.DataFrame(self.metrics)

    def draw(self, ax: Axes) -> None:
        """Flag accuracy over the finetuning, where steps were not forced."""
        points = [(m["step"], m["flag_accuracy"]) for m in self.metrics if m["flag_accuracy"] is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        plot_curves(ax, [Curve(self.result.curriculum, steps, values)], "flag accuracy", steps="step")

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain values."""
        return {**json_safe(self.result), "run": str(self.run), "resumed": self.resumed}
