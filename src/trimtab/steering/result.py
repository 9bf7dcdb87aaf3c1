"""What `trimtab steer` found: texts and their doses, for the terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trimtab.runs.tables import COUNT, Column, result_table
from trimtab.steering.equal_dose import DoseSummary
from trimtab.steering.operations import OPERATIONS
from trimtab.steering.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """One decoded text."""

    prompt: int
    """Index of the prompt."""
    sample: int
    """Which sample of the prompt."""
    text: str
    n_tokens: int
    finish: str
    """Why it ended: `eos`, `stop` or `length`."""


@dataclass(frozen=True, kw_only=True)
class DoseResult:
    """All continuations at one dose; the first arm is unsteered."""

    name: str
    dose: float | list[float] | None
    """Requested dose of every feature (one each if they differ); None if unsteered."""
    realised: DoseSummary
    """What was applied."""
    kl_local: float | None
    """Mean over tokens of KL(steered ‖ this token's edit removed), in nats; None if not measured."""
    kl_total: float | None
    """Mean over tokens of KL(steered ‖ unsteered), in nats; None if not measured."""
    unsteered_nll: float | None
    """Mean negative log-probability of the tokens under the unsteered model, in nats; None if not measured."""
    continuations: list[Continuation]


@dataclass(frozen=True, kw_only=True)
class SteerResult:
    """Unsteered and steered continuations of the same prompts."""

    model: str
    site: str
    features: list[int]
    operation: str
    unit: str
    positions: str
    prompts: list[str]
    """The prompts as text."""
    arms: list[DoseResult]
    """Unsteered first, then one per dose."""
    run: str | None
    """Directory of the run, if one was written."""
    steered_with: str = ""
    """What steered, in words; results of earlier versions do not say it."""
    trace: Trace | None = field(default=None, compare=False, repr=False)
    """What was done at each token; None in what was read back from JSON alone."""

    @property
    def unsteered(self) -> DoseResult:
        """The arm without edits."""
        return self.arms[0]

    @property
    def steered(self) -> list[DoseResult]:
        """One arm per dose."""
        return self.arms[1:]

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the trace."""
        return {name: value for name, value in asdict(replace(self, trace=None)).items() if name != "trace"}

    def render(self) -> RenderableType:
        """For the terminal: side by side at one dose, a table of doses at several."""
        what = self.steered_with or f"feature {', '.join(map(str, self.features))}"
        known = OPERATIONS.get(self.operation)
        dose = f", unit {self.unit}" if known is not None and known.has_dose else ""
        head = f"{self.operation} {what} at {self.site} of {self.model}{dose}, positions {self.positions}"
        parts: list[RenderableType] = [Text(head, style="bold")]
        if len(self.steered) == 1:
            parts += self._side_by_side()
        else:
            parts += self._texts_by_dose()
        parts.append(self._dose_table())
        if self.run:
            parts.append(Text(f"run {self.run}", style="dim"))
        return Group(*parts)

    def _side_by_side(self) -> list[RenderableType]:
        parts: list[RenderableType] = []
        unsteered, steered = self.arms
        for before, after in zip(unsteered.continuations, steered.continuations, strict=True):
            table = Table(expand=True, title=self._title(before), title_justify="left", show_lines=True)
            table.add_column(unsteered.name, ratio=1)
            table.add_column(steered.name, ratio=1)
            table.add_row(Text(before.text), Text(after.text))
            parts.append(table)
        return parts

    def _texts_by_dose(self) -> list[RenderableType]:
        parts: list[RenderableType] = []
        for index, first in enumerate(self.unsteered.continuations):
            table = Table("dose", "text", expand=True, title=self._title(first), title_justify="left", show_lines=True)
            for arm in self.arms:
                table.add_row(arm.name, Text(arm.continuations[index].text))
            parts.append(table)
        return parts

    def _title(self, continuation: Continuation) -> Text:
        several = sum(c.prompt == continuation.prompt for c in self.unsteered.continuations) > 1
        sample = f" (sample {continuation.sample})" if several else ""
        return Text(self.prompts[continuation.prompt] + sample)

    def _dose_table(self) -> RenderableType:
        columns = [
            Column("arm", "name"),
            Column("edits", "realised.n_edits", COUNT),
            Column("‖Δ‖/‖x‖", "realised.relative", ".3f"),
            Column("KL local", "kl_local", ".3f"),
            Column("KL total", "kl_total", ".3f"),
            Column("NLL unsteered", "unsteered_nll", ".3f"),
        ]
        table = result_table(columns, self.arms)
        return Panel.fit(table, title="what was done, mean over tokens (KL and NLL in nats)", title_align="left")
