"""What an evaluation of flags comes to, part by part, and its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trimtab.flags.evaluation.control_result import FlagControl
from trimtab.flags.evaluation.effects import Effects
from trimtab.flags.evaluation.erosion import Erosion
from trimtab.flags.evaluation.measured import Moment
from trimtab.flags.evaluation.price import Price
from trimtab.flags.evaluation.reading import Reading
from trimtab.flags.evaluation.reliance import Reliance
from trimtab.runs.results import Result
from trimtab.runs.shown import Shown, ShownTable
from trimtab.runs.tables import SIGNED, Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class PartSeconds:
    """How long a part of one model took, when it was computed. The first part that reads activations pays for them."""

    moment: Moment
    part: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunControl:
    """What switches decide at the end of a run."""

    run: str
    control: FlagControl


@dataclass(frozen=True, kw_only=True, repr=False)
class FlagEvaluation(Result):
    """Finetunings with flags side by side. Parts that were not measured are None."""

    model: str
    """The original."""
    concepts: tuple[str, ...]
    runs: tuple[str, ...]
    fitted: int
    """Held-out examples that probes, directions and means are fitted on."""
    reported: int
    """Others, which are reported."""
    unit: str
    """What the two differ in, and what intervals resample: `document`, `prompt`, or `example` where these are few."""
    reading: Reading | None
    erosion: Erosion | None
    effects: Effects | None
    reliance: Reliance | None
    price: Price | None
    controls: tuple[RunControl, ...]
    """At the end of each run; empty where control was not measured."""
    seconds: tuple[PartSeconds, ...]
    notes: tuple[str, ...] = ()
    """What could not be measured or compared, and why; what was measured anew."""

    @property
    def parts(self) -> dict[str, Result]:
        """What was measured, by title."""
        found: dict[str, Result | None] = {
            "Reading": self.reading, "Erosion": self.erosion, "Directions outside the flags": self.effects,
            "Reliance": self.reliance, "Price": self.price,
        }  # fmt: skip
        measured = {title: part for title, part in found.items() if part is not None}
        return measured | {f"Control, {one.run}": one.control for one in self.controls}

    def headline(self) -> str:
        n = len(self.runs)
        about = (
            f"{n} {'runs' if n > 1 else 'run'} of {self.model} with flags for {', '.join(self.concepts)}, measured on "
            f"{self.reported} held-out examples; probes are fitted on {self.fitted} others, with no {self.unit} in both"
        )
        said = [f"{title}: {part.headline()}" for title, part in self.parts.items()]
        return "\n".join([about, *said, *self.notes])

    def tables(self) -> dict[str, Table]:
        """The main table of each part, and what each took."""
        found: dict[str, Table] = {}
        for title, part in self.parts.items():
            for number, (name, table) in enumerate(part.tables().items()):
                key = name if number == 0 and not isinstance(part, FlagControl) else f"{title.lower()}, {name}"
                found[key] = replace(table, title=table.title or f"{title}: {name}" * bool(number) or title)
        if len(self.controls) > 1:
            found["control"] = self._control_of_runs()
        columns = [
            Column("run", "moment.run"), Column("step", "moment.step", ",d"), Column("part", "part"),
            Column("seconds", "seconds", ",.0f"),
        ]  # fmt: skip
        return {**found, "seconds": Table(columns=columns, rows=self.seconds, title="Seconds")}

    def _control_of_runs(self) -> Table:
        """What switches decide in each run, side by side."""
        columns = [Column("run", "run", whole=True), Column("on − off", "control.difference", SIGNED)]
        caption = "Rate of a concept with its flag on minus off on neutral prompts, mean over concepts."
        return Table(columns=columns, rows=self.controls, title="Control of all runs", caption=caption)

    def render(self) -> Any:
        """For the terminal: the main table of each part."""
        from rich.console import Group
        from rich.text import Text

        mains = (replace(next(iter(part.tables().values())), title=title) for title, part in self.parts.items())
        return Group(Text(self.headline()), *mains)

    def draw(self, ax: Axes) -> None:
        """Erosion over steps, or what else was measured first."""
        part = self.erosion or next(iter(self.parts.values()))
        part.draw(ax)

    def shown(self) -> list[Shown]:
        """Sections of the page."""
        found: list[Shown] = []
        for title, part in self.parts.items():
            if isinstance(part, FlagControl):
                found.append(part.shown(title))
                continue
            figures: dict[str, Callable[[Axes], None]] = {_CAPTIONS.get(title, title): part.draw}
            if isinstance(part, Erosion):
                figures = part.figures
            found.append(Shown.of(title, part, figures, leave_out=("by layer", "by site", "over steps")))
        if len(self.controls) > 1:
            table = self._control_of_runs()
            found.append(Shown(title=table.title, headline=table.caption, tables=(ShownTable.of(table, table.title),)))
        return found


_CAPTIONS = {
    "Reading": "AUC of flags after each layer's MLP, mean over concepts, at the end of each run",
    "Directions outside the flags": "Effect of a concept's direction outside the flags, mean over concepts",
    "Reliance": "Cross-entropy of responses with flags of other concepts, above that with right ones",
    "Price": "Perplexity on general text",
}
