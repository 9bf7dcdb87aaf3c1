"""What a search found, with the evidence and the alternatives beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.dictionaries.meanings import FeatureWords
from trimtab.errors import named
from trimtab.finding.exact import Agreement, ScoredFeature
from trimtab.runs import json_safe
from trimtab.runs.figures import MarkedLine, plot_lines
from trimtab.runs.results import Result
from trimtab.runs.tables import INTERVAL, NUMBER, SIGNED, Cell, Column, Table
from trimtab.stats import Interval, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOUND, RANDOM = "found", "random"
"""Names of what was found by causal search, and of random features that went through the same choice."""
SHOWN_TEXTS = 6


@dataclass(frozen=True, kw_only=True)
class SteeredPart:
    """A direction of an edit."""

    site: str
    feature: int | None
    """None for a vector."""
    dose: float
    """Relative, with its sign; 0 where the feature is removed."""
    words: FeatureWords | None
    """What the feature fires on and what it promotes."""
    reads: float | None
    """Mean activation on wanted answers minus that on unwanted ones."""
    auc: float | None
    """How often it fires more on a wanted answer than on an unwanted one."""
    writes: Interval | None = None
    """Its effect by itself at its dose, of what was found."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An edit at one strength, on what chose nothing."""

    scale: float
    """Factor on the doses that were chosen."""
    effect: Interval
    """On the wish, over the report's examples."""
    kl: Interval
    """KL(steered ‖ unsteered), over neutral prompts, in nats per token."""


@dataclass(frozen=True, kw_only=True)
class WrittenEffect:
    """Texts on neutral prompts at the strength of equal price."""

    read: Interval | None
    """What the judge reads in them; None without a judge."""
    change: Interval | None
    """Above the unsteered texts, paired."""
    in_band: Interval
    """Share of texts whose likelihood is ordinary."""
    repetition: Interval
    """Share of repeated 4-grams."""


@dataclass(frozen=True, kw_only=True)
class WayResult:
    """One way of steering: chosen on the examples for it, measured on the report's."""

    name: str
    parts: tuple[SteeredPart, ...]
    operation: str
    """`add`, `ablate`, or `instruction`."""
    instruction: str
    """Of prompting."""
    tried: int
    """Candidates that it chose from."""
    chosen_effect: Interval
    """On the examples that it was chosen on: too good."""
    own: Measured
    """As it was chosen, within the budget."""
    equal_dose: Measured | None
    """At the dose of what was found; None where doses have no meaning."""
    equal_kl: Measured | None
    """At the price of what was found, matched on other neutral text; None where there is no dose to match with."""
    behind: Interval | None
    """The effect of what was found minus this one's at equal price, paired by example; None for itself."""
    behind_at_dose: Interval | None
    """The same at equal dose."""
    written: WrittenEffect

    @property
    def label(self) -> str:
        """What it steers with."""
        if self.operation == "instruction":
            return " ".join(self.instruction.split())[:60]
        named = [
            f"{part.site} " + (f"feature {part.feature}" if part.feature is not None else "vector")
            for part in self.parts
        ]
        doses = [" removed" if self.operation == "ablate" else f" {part.dose:+.2g}" for part in self.parts]
        return ", ".join(name + dose for name, dose in zip(named, doses, strict=True))


@dataclass(frozen=True, kw_only=True)
class WrittenTexts:
    """A neutral prompt, and what is written behind it."""

    prompt: str
    texts: dict[str, str]
    """By way, `unsteered` first."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What read the generated texts, or why nothing did."""

    name: str
    accuracy: Interval | None
    missing: str


@dataclass(frozen=True, kw_only=True)
class FoundFacts:
    """What a run keeps of a search."""

    model: str
    saes: tuple[str, ...]
    sites: tuple[str, ...]
    n_features: int
    wish: str
    """Kind of the wish."""
    unit: str
    """Of effects."""
    notes: tuple[str, ...]
    counts: dict[str, int]
    """Examples of each split."""
    budget: str
    dose: tuple[float, ...]
    features: tuple[ScoredFeature, ...]
    """All that were scored exactly, best first."""
    agreement: tuple[Agreement, ...]
    ways: tuple[WayResult, ...]
    curse: Interval
    """Winner's curse: the effect of what was found on the examples that chose it, minus that on the report's."""
    judge: Judged
    texts: tuple[WrittenTexts, ...]
    missing: dict[str, str]
    """Alternatives that could not be had, and why."""
    seed: int
    seconds: dict[str, float]
    """That each stage took."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Found(FoundFacts, Result):
    """What a search found. `source` steers with it."""

    source: Any = field(default=None, compare=False)
    """A `StaticSource` for `decode`, `applied` and `steer`."""
    run: Path | None = None

    def __getitem__(self, way: str) -> WayResult:
        return named({one.name: one for one in self.ways}, way, "way")

    @property
    def found(self) -> WayResult:
        return self[FOUND]

    @property
    def random(self) -> WayResult:
        return self[RANDOM]

    @property
    def yes(self) -> bool:
        """Whether features serve the wish: above nothing, and above random ones that went through the same choice."""
        over_random = self.random.behind_at_dose or self.random.behind
        assert over_random is not None
        return self.found.own.effect.low > 0 and over_random.low > 0

    def headline(self) -> str:
        found, random = self.found, self.random
        effect = f"{number_text(found.own.effect, '+.3g')} {self.unit}"
        price = f"KL {number_text(found.own.kl, '.3g')} nats per token"
        if not self.yes:
            return (
                f"No: no feature is shown to serve the wish. The best one chosen, {found.label}, has an effect of "
                f"{effect} on {self.counts['report']} examples that chose nothing; random features chosen likewise "
                f"{number_text((random.equal_dose or random.own).effect, '+.3g')}"
            )
        change = found.written.change
        read = f"; in generated text {number_text(change, '+.2f')} by {self.judge.name}" if change else ""
        return f"Yes: {found.label}: {effect} on {self.counts['report']} examples that chose nothing, {price}{read}"

    def tables(self) -> dict[str, Table]:
        return {
            "ways": self._ways(),
            "found": self._parts(),
            "written": self._written(),
            "texts": self._texts(),
            "stages": self._stages(),
            "features": self._features(),
        }

    def _ways(self) -> Table:
        columns = [
            Column("way", "name", whole=True),
            Column("steers with", "label"),
            Column("effect", "own.effect", SIGNED, note=self.unit),
            Column("at equal dose", "equal_dose.effect", SIGNED, spare=2),
            Column("at equal KL", "equal_kl.effect", SIGNED),
            Column("KL there", "equal_kl.kl", INTERVAL, note="reached, nats per token", spare=6),
            Column("found minus this", "behind", SIGNED, note="at equal KL, or as chosen", spare=1),
            Column("KL", "own.kl", INTERVAL, note="nats per token"),
            Column("reads (AUC)", _auc, ".2f", spare=3),
            Column("tried", "tried", "d", spare=4),
        ]
        caption = (
            f"All chosen on {self.counts['choice']} examples within {self.budget} on neutral text for choosing "
            f"(where no instruction is, the cheapest), shown on {self.counts['report']} examples that chose nothing, "
            f"with the price on other neutral text. Winner's curse of what was found: "
            f"{number_text(self.curse, '+.3g')}. "
            + " ".join([*(f"{name}: {why}." for name, why in self.missing.items()), *(f"{n}." for n in self.notes)])
        )
        return Table(columns=columns, rows=self.ways, caption=caption.strip(), emphasis=self.found)

    def _parts(self) -> Table:
        columns = [
            Column("feature", _place, whole=True),
            Column("dose", "dose", "+.3g"),
            *_WORDS,
            Column("reads: difference", "reads", NUMBER),
            Column("reads: AUC", "auc", ".2f"),
            Column("writes by itself", "writes", SIGNED, note=self.unit),
        ]
        return Table(columns=columns, rows=self.found.parts, title="what was found")

    def _written(self) -> Table:
        columns = [
            Column("way", "name", whole=True),
            Column("read in texts", "written.read", ".2f"),
            Column("change", "written.change", "+.2f"),
            Column("in the likelihood band", "written.in_band", ".2f"),
            Column("4-gram repetition", "written.repetition", ".3f"),
        ]
        accuracy = f", right on {number_text(self.judge.accuracy, '.2f')} of other texts" if self.judge.accuracy else ""
        read = f"Read by {self.judge.name}{accuracy}" if self.judge.name else self.judge.missing
        caption = f"Texts on neutral prompts at equal KL. {read}."
        return Table(columns=columns, rows=self.ways, caption=caption)

    def _texts(self) -> Table:
        names = dict.fromkeys(name for one in self.texts for name in one.texts)
        columns = [Column("prompt", "prompt")]
        columns += [Column(name, _text_by(name), spare=max(i - 1, 0)) for i, name in enumerate(names)]
        return Table(columns=columns, rows=self.texts, caption="Texts on neutral prompts, steered at equal KL.")

    def _stages(self) -> Table:
        columns = [Column("dose", "dose", NUMBER), Column("Spearman's correlation", "spearman", ".2f")]
        caption = f"Gradient and exact effect of {len(self.features)} features, random ones included."
        return Table(columns=columns, rows=self.agreement, caption=caption)

    def _features(self) -> Table:
        doses = [Column(f"writes at {dose:g}", _at(i), SIGNED, spare=i) for i, dose in enumerate(self.dose)]
        columns = [
            Column("feature", _place, whole=True),
            Column("sign", "sign"),
            Column("from", "origin", spare=5),
            *_WORDS,
            Column("reads: AUC", "auc", ".2f"),
            Column("by gradient", "first_order", "+.3g", note=f"at {self.dose[0]:g}"),
            *doses,
        ]
        caption = f"On {self.counts['candidates']} examples. Reads: how often it fires more on a wanted answer."
        return Table(columns=columns, rows=self.features[:20], caption=caption)

    def draw(self, ax: Axes) -> None:
        """Effect against price, a line for each way; what was chosen is marked."""
        lines: list[MarkedLine] = []
        for way in self.ways:
            points = {(0.0, 0.0)}
            for one in (way.own, way.equal_dose, way.equal_kl):
                if one is not None:
                    points.add((one.kl.estimate, one.effect.estimate))
            own = way.own.kl.estimate, way.own.effect.estimate
            lines.append(MarkedLine(way.name, sorted(points), own, way.name == FOUND))
        plot_lines(ax, lines, "KL to unsteered, nats per token", f"effect, {self.unit}")

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
        facts = {name: getattr(self, name) for name in FoundFacts.__dataclass_fields__}
        return {**json_safe(facts), "yes": self.yes, "run": None if self.run is None else str(self.run)}


def _auc(way: WayResult) -> Cell:
    known = [part.auc for part in way.parts if part.auc is not None]
    return max(known, key=lambda value: abs(value - 0.5)) if known else None


def _at(number: int) -> Any:
    return lambda row: row.writes[number] if number < len(row.writes) else None


def _text_by(way: str) -> Callable[[WrittenTexts], str | None]:
    return lambda row: row.texts.get(way)


def _place(row: SteeredPart | ScoredFeature) -> str:
    """By which the page leads to what is known of a feature."""
    return f"{row.site} vector" if row.feature is None else f"{row.site}:{row.feature}"


def _fires_on(row: SteeredPart | ScoredFeature) -> str:
    if row.words is None:
        return ""
    return row.words.meaning or " ".join(map(_visible, row.words.fires_on))


def _promotes(row: SteeredPart | ScoredFeature) -> str:
    return "" if row.words is None else " ".join(map(_visible, row.words.promotes))


def _visible(token: str) -> str:
    return token.strip() or repr(token)


_WORDS = (Column("means or fires on", _fires_on, spare=6), Column("promotes", _promotes))
