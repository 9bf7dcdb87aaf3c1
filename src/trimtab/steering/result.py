"""What `trimtab steer` found: texts and their doses, for the terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from trimtab.errors import UserError
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, Column, Table, in_short
from trimtab.stats import Interval
from trimtab.steering.equal_dose import DoseSummary
from trimtab.steering.operations import OPERATIONS
from trimtab.steering.ordinary_texts import Fluency, OrdinaryText
from trimtab.steering.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    control_of: str = ""
    """The arm whose dose random features, or random directions, have here; empty for all others."""
    fluency: Fluency | None = None
    """How ordinary the texts are; None if it was not asked for."""
    score: Interval | None = None
    """Its effect on a wish, over the wish's examples; None if it was not asked for."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SteerResult(Result):
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
    words: list[str] = field(default_factory=list[str])
    """What each feature fires on and promotes, as far as it is known."""
    ordinary: OrdinaryText | None = None
    """What the unsteered model's own texts are like, if it was asked for."""
    score_unit: str = ""
    """What effects on the wish are in, if they were asked for."""
    trace: Trace | None = field(default=None, compare=False, repr=False)
    """What was done at each token; None in what was read back from JSON alone."""

    @property
    def unsteered(self) -> DoseResult:
        """The arm without edits."""
        return self.arms[0]

    @property
    def steered(self) -> list[DoseResult]:
        """One arm per dose."""
        return [arm for arm in self.arms[1:] if not arm.control_of]

    @property
    def breaks(self) -> DoseResult | None:
        """The arm of the smallest dose at which fewer than half of the texts are ordinary, interval or not; None where
        there is none, or it was not asked for."""
        arms = sorted(self.steered, key=lambda arm: arm.realised.relative)
        return next((arm for arm in arms if arm.fluency is not None and arm.fluency.broken), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the trace and what was not asked for."""
        found = {name: value for name, value in asdict(replace(self, trace=None)).items() if name != "trace"}
        for part, names in (
            (found, ("ordinary", "score_unit", "words")),
            *((arm, ("control_of", "fluency", "score")) for arm in found["arms"]),
        ):
            for name in names:
                if not part[name]:
                    del part[name]
        return found

    def headline(self) -> str:
        what = self.steered_with or f"feature {', '.join(map(str, self.features))}"
        known = OPERATIONS.get(self.operation)
        dose = f", unit {self.unit}" if known is not None and known.has_dose else ""
        sites = in_short(self.site.split(", "), "sites")
        return f"{self.operation} {what} at {sites} of {self.model}{dose}, positions {self.positions}"

    def tables(self) -> dict[str, Table]:
        """Texts, one row each, and what was done, one row an arm."""
        rows = [
            {"prompt": self.prompts[one.prompt], "sample": one.sample, "arm": arm.name, "text": one.text}
            for places in zip(*(arm.continuations for arm in self.arms), strict=True)
            for arm, one in zip(self.arms, places, strict=True)
        ]
        several = any(row["sample"] for row in rows)
        names = ["prompt", *["sample"] * several, "arm", "text"]
        columns = [Column(name, name, "d" if name == "sample" else "") for name in names]
        return {"texts": Table(columns=columns, rows=rows), "doses": self._doses()}

    def _doses(self) -> Table:
        """What was done, and how ordinary it left the texts."""
        columns = list(_DOSES)
        caption = (
            "what was done, mean over tokens (KL and NLL in nats; KL total: to the unsteered model, local: to the same "
            "token without its own edit)"
        )
        if self.score_unit:
            columns.append(Column("wish", "score", "+.3g", note=self.score_unit))
            caption += f"; wish: the effect on its examples that chose nothing, {self.score_unit}"
        if (known := self.ordinary) is not None:
            columns += _FLUENCY
            caption += (
                f"; ordinary: NLL of a text from {known.low:.2f} to {known.high:.2f}, 4-gram repetition at most "
                f"{known.repetition:.2f}, as {known.n_own + known.n_neutral} unsteered texts are"
            )
            doses = len(self.arms) > 2
            broken = self.breaks and (f"breaks at {self.breaks.name}" if doses else "is broken")
            caption += f"; fluency {broken or 'holds'}, over "
            caption += f"{len(self.prompts)} prompt" + "s" * (len(self.prompts) > 1)
        return Table(columns=columns, rows=self.arms, caption=caption)

    def draw(self, ax: Axes) -> None:
        """KL to the unsteered model at each token of a continuation, mean over texts, an arm each."""
        if self.trace is None or not any(arm.kl_total is not None for arm in self.arms):
            raise UserError("a plot of steering", "its KL was not measured", "steer with kl=True")
        branches = [row["branch"] for row in self.trace.facts["rows"]]
        kl = self.trace.per_row("kl_total")
        curves = []
        for number, arm in enumerate(self.arms):
            rows = [values for branch, values in zip(branches, kl, strict=True) if branch == number]
            steps = range(max(map(len, rows)))
            means = [mean(values[i] for values in rows if i < len(values)) for i in steps]
            curves += [Curve(arm.name, [i + 1 for i in steps], means)] if number else []
        plot_curves(ax, curves, "KL to unsteered, nats", steps="token")

    def render(self) -> RenderableType:
        """For the terminal: side by side at one dose, a table of doses at several."""
        parts: list[RenderableType] = [Text(self.headline(), style="bold"), *map(Text, self.words)]
        several = len(self.unsteered.continuations) > len(self.prompts)
        for places in zip(*(arm.continuations for arm in self.arms), strict=True):
            title = self.prompts[places[0].prompt] + f" (sample {places[0].sample})" * several
            table = RichTable(expand=True, title=Text(title), title_justify="left", show_lines=True)
            texts = [Text(one.text) for one in places]
            if len(self.steered) == 1:
                for arm in self.arms:
                    table.add_column(arm.name, ratio=1)
                table.add_row(*texts)
            else:
                table.add_column("dose")
                table.add_column("text")
                for arm, text in zip(self.arms, texts, strict=True):
                    table.add_row(arm.name, text)
            parts.append(table)
        parts.append(self.tables()["doses"])
        if self.run:
            parts.append(Text(f"run {self.run}", style="dim"))
        return Group(*parts)


_DOSES = (
    Column("arm", "name"),
    Column("edits", "realised.n_edits", COUNT),
    Column("‖Δ‖/‖x‖", "realised.relative", ".3f"),
    Column("KL local", "kl_local", ".3f"),
    Column("KL total", "kl_total", ".3f"),
    Column("NLL unsteered", "unsteered_nll", ".3f"),
)
_FLUENCY = (
    Column("ordinary texts", "fluency.ordinary", ".2f"),
    Column("repetition", "fluency.repetition", ".2f"),
    Column("fluency", lambda arm: "broken" if arm.fluency.broken else "holds"),
)
