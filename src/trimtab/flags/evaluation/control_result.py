"""What switching flags does to what is written, beside other ways of control: numbers, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trimtab.judges.concept_quality import JudgeQuality
from trimtab.runs.figures import Curve, Mark, plot_curves, plot_intervals
from trimtab.runs.results import Result
from trimtab.runs.shown import Shown
from trimtab.runs.tables import INTERVAL, NUMBER, SIGNED, Column, Table
from trimtab.stats import Interval, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALONE = ("flags free", "finetuned")
"""Models that are left alone, and diverge from the original."""
ALL = "all concepts"
"""Stands for the mean over concepts."""
_KINDS = {
    "neutral": "ways of control",
    "asked": "ways of keeping away",
    "conflict": "ways of control against a request",
}
_RATES = "Rates are shares of the fluent texts in which the judge finds the concept, with 95% intervals over prompts."


@dataclass(frozen=True, kw_only=True)
class ConceptControl:
    """What one flag does; rates are None where no text was fluent."""

    concept: str
    on: Interval | None
    """Rate of the concept on neutral prompts, its flag on."""
    off: Interval | None
    free: Interval | None
    difference: Interval | None
    """On minus off, paired by prompt."""
    asked_free: Interval | None
    """Rate where prompts ask for the concept, its flag free."""
    asked_off: Interval | None
    """The same with its flag off."""
    suppressed: Interval | None
    """Free minus off there, paired."""
    other: str
    """The concept that is on where prompts ask for this one, which is off; empty with a single concept."""
    conflict_asked: Interval | None
    """Rate of this concept there."""
    conflict_other: Interval | None
    """Rate of the other one there."""


@dataclass(frozen=True, kw_only=True)
class BoardRow:
    """One row of the switchboard, on neutral prompts."""

    switch: str
    rates: tuple[Interval | None, ...]
    """Of every concept, in their order."""
    fluent: Interval


@dataclass(frozen=True, kw_only=True)
class ArmRate:
    """One way of control on prompts of a kind."""

    prompts: str
    """`neutral`; `asked`, where it is to keep a concept away that is asked for; `conflict`, where it is to bring one
    about while another is asked for."""
    concept: str
    """What it aims at; `all concepts` for the mean."""
    arm: str
    scale: float | None
    """For the frontier: times on, or times the dose that was chosen; None for the way as it is."""
    rate: Interval | None
    fluent: Interval
    difference: Interval | None
    """Rate with flags (on; off where the concept is to stay away) minus the arm's, paired by prompt; None for flags."""
    kl: Interval | None
    """To the original model at the tokens that were chosen on neutral prompts, nats per token; None where an
    instruction changes them."""
    equal_kl: str
    """For how many of the concepts the divergence was brought to that of flags on validation, within 10%, such as
    `2 of 3`; empty where that was not tried."""
    relative_dose: float | None
    """Mean ‖Δ‖/‖x‖ over edited places and sites; None where nothing is edited."""
    chosen: Mapping[str, Any]
    """How it was chosen."""


@dataclass(frozen=True, kw_only=True)
class SampleText:
    """One prompt's texts; the first samples, none chosen."""

    concept: str
    prompt: str
    free: str
    on: str
    off: str


@dataclass(frozen=True, kw_only=True, repr=False)
class FlagControl(Result):
    """What flags decide, by a judge that is not the model."""

    concepts: tuple[ConceptControl, ...]
    difference: Interval | None
    """On minus off on neutral prompts, mean over concepts."""
    board: tuple[BoardRow, ...]
    arms: tuple[ArmRate, ...]
    """Beside other ways of control; empty without the original model."""
    judge: JudgeQuality | None
    """On labelled texts that it was not fitted on; None if none were given and it does not know its own."""
    texts: tuple[SampleText, ...]
    prompts: int
    """Neutral prompts that are reported on; no model was trained on one of them."""
    validation_prompts: int
    """Others, on which doses, features and instructions were chosen."""
    samples: int
    """Texts of each prompt under each switch; ways of control write one."""
    max_new_tokens: int
    temperature: float
    seed: int
    missing: Mapping[str, str]
    """Ways of control that are missing, and why."""

    @property
    def frontier(self) -> list[ArmRate]:
        """Ways at several strengths, and models that have none, mean over the compared concepts."""
        rows = [one for one in self.arms if (one.prompts, one.concept) == ("neutral", self.arms[0].concept)]
        return [one for one in rows if one.scale is not None or one.arm in ALONE]

    def headline(self) -> str:
        n, texts = len(self.concepts), f"{self.samples} text{'s' if self.samples > 1 else ''} each"
        return (
            f"concept rate with the flag on minus off: {number_text(self.difference, SIGNED)} "
            f"(mean of {n} concept{'s' if n > 1 else ''}, {self.prompts} neutral prompts, {texts}; {_said(self.judge)})"
        )

    def tables(self) -> dict[str, Table]:
        """Concepts, the switchboard, ways of control, the frontier, the judge, texts, and what is missing."""
        found = {"concepts": _concepts(self), "switchboard": self.switchboard(), "conflicts": _conflicts(self)}
        if self.arms:
            found |= {title: _arms(self, kind) for kind, title in _KINDS.items()}
            found |= {"frontier": _frontier(self), "by concept": _by_concept(self)}
        if self.judge is not None:
            caption = f"On {self.judge.heldout:,} labelled texts. On what the model writes it is not known."
            found["judge"] = replace(self.judge.tables()["concepts"], title="Accuracy of the judge", caption=caption)
        found["texts"] = _texts(self)
        if self.missing:
            rows = [{"what": name, "why": why} for name, why in self.missing.items()]
            found["missing"] = Table(columns=[Column("what", "what"), Column("why", "why")], rows=rows, title="Missing")
        return found

    def switchboard(self) -> Table:
        """Rates of every concept under every switch."""
        columns = [Column("switch", "switch", whole=True)]
        columns += [Column(one.concept, lambda row, i=i: row.rates[i], INTERVAL) for i, one in enumerate(self.concepts)]
        columns.append(Column("fluent", "fluent", INTERVAL, spare=1))
        caption = f"Rate of each concept on neutral prompts; what is not named is free. {_RATES}"
        return Table(columns=columns, rows=self.board, title="Switchboard", caption=caption)

    def draw(self, ax: Axes) -> None:
        """On minus off of each concept."""
        marks = [Mark(one.concept, one.difference) for one in self.concepts if one.difference is not None]
        marks += [Mark(ALL, self.difference, strong=True)] if self.difference is not None else []
        plot_intervals(ax, marks, "rate with the flag on minus off")

    def draw_frontier(self, ax: Axes) -> None:
        """Rate against divergence, a curve for each way of control."""
        curves = []
        for arm in dict.fromkeys(point.arm for point in self.frontier):
            points = sorted((p.kl.estimate, p.rate.estimate) for p in self.frontier if p.arm == arm and p.rate and p.kl)
            curves.append(Curve(arm, [kl for kl, _ in points], [rate for _, rate in points]))
        plot_curves(ax, curves, "rate of the concept", steps="KL to the original model, nats per token")

    def shown(self, title: str = "Control") -> Shown:
        """The section of a page."""
        figures = {"Rate of the concept with the flag on minus off, by concept": self.draw}
        if self.frontier:
            figures["Rate of the concept against the divergence from the original model, by strength"] = (
                self.draw_frontier
            )
        return Shown.of(title, self, figures, leave_out=("by concept",))


def _concepts(result: FlagControl) -> Table:
    columns = [
        Column("concept", "concept", whole=True),
        Column("on", "on", INTERVAL, note="neutral prompts"),
        Column("off", "off", INTERVAL, note="neutral prompts"),
        Column("free", "free", INTERVAL, note="neutral prompts", spare=3),
        Column("on − off", "difference", SIGNED),
        Column("asked, free", "asked_free", INTERVAL, spare=1),
        Column("asked, off", "asked_off", INTERVAL, spare=1),
        Column("suppressed", "suppressed", SIGNED, note="free − off where asked"),
    ]
    caption = f"{_RATES} Asked: prompts that ask for the concept."
    return Table(columns=columns, rows=result.concepts, title="Flags on, off and free", caption=caption)


def _conflicts(result: FlagControl) -> Table:
    columns = [
        Column("asked for and off", "concept", whole=True),
        Column("rate", "conflict_asked", INTERVAL),
        Column("on", "other", whole=True),
        Column("its rate", "conflict_other", INTERVAL),
    ]
    caption = "Prompts that ask for a concept while its flag is off and another one is on."
    rows = [one for one in result.concepts if one.other]
    return Table(columns=columns, rows=rows, title="Asked for one, another one on", caption=caption)


def _arms(result: FlagControl, kind: str) -> Table:
    flags = "flags off" if kind == "asked" else "flags on"
    columns = [
        Column("way of control", "arm", whole=True),
        Column("rate", "rate", INTERVAL),
        Column(f"{flags} − it", "difference", SIGNED),
        Column("fluent", "fluent", INTERVAL, spare=2),
    ]
    if kind == "neutral":
        columns += [
            Column("KL", "kl", NUMBER, note="nats per token", spare=1),
            Column("equal KL", "equal_kl", note="reached", spare=4),
            Column("‖Δ‖/‖x‖", "relative_dose", NUMBER, spare=3),
        ]
    caption = {
        "neutral": f"Neutral prompts. What is chosen was chosen on {result.validation_prompts} other prompts. At equal "
        "kl: scaled there to the divergence of flags on per text, and for how many concepts that was reached within "
        "10%. KL is to the original model at the tokens that were written; not measured where an instruction changes "
        "the prompts.",
        "asked": "Prompts that ask for the concept, which each way is to keep away. Subtracted: at minus its dose.",
        "conflict": "Prompts that ask for another concept, while each way is to bring this one about; flags: this one "
        "on, the other one off.",
    }[kind]
    shown = result.arms[0].concept
    rows = [one for one in result.arms if (one.prompts, one.concept, one.scale) == (kind, shown, None)]
    caption = f"{'Mean over the compared concepts' if shown == ALL else f'Concept {shown}'}. {caption} {_RATES}"
    return Table(columns=columns, rows=rows, title=_KINDS[kind].capitalize(), caption=caption)


def _by_concept(result: FlagControl) -> Table:
    columns = [
        Column("concept", "concept", whole=True),
        Column("prompts", "prompts", whole=True),
        Column("way of control", "arm", whole=True),
        Column("rate", "rate", INTERVAL),
        Column("flags − it", "difference", SIGNED),
        Column("KL", "kl", NUMBER, note="nats per token"),
    ]
    rows = [one for one in result.arms if one.concept != ALL and one.scale is None]
    return Table(columns=columns, rows=rows, title="Ways of control by concept")


def _frontier(result: FlagControl) -> Table:
    columns = [
        Column("way of control", "arm", whole=True),
        Column("strength", "scale", "g"),
        Column("rate", "rate", INTERVAL),
        Column("KL", "kl", INTERVAL, note="nats per token"),
        Column("fluent", "fluent", INTERVAL, spare=1),
    ]
    caption = "Mean over the compared concepts. Strength: times on, or times the dose that was chosen on validation."
    return Table(columns=columns, rows=result.frontier, title="Effect and divergence", caption=caption)


def _said(judge: JudgeQuality | None) -> str:
    """How good the judge is."""
    if judge is None:
        return "the judge's accuracy is not known"
    said = f"{number_text(judge.accuracy, INTERVAL)} on {judge.heldout:,} labelled texts"
    return f"the judge's accuracy is {said}, and not known on the model's"


def _texts(result: FlagControl) -> Table:
    names = ("concept", "prompt", "free", "on", "off")
    columns = [Column(name, name) for name in names]
    return Table(columns=columns, rows=result.texts, title="Texts", caption="First samples of the first prompts.")
