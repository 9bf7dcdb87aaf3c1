"""What a search found, with the evidence and the alternatives beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.dictionaries.meanings import FeatureWords
from trimtab.errors import named
from trimtab.finding.options import FindOptions
from trimtab.runs import json_safe
from trimtab.runs.figures import MarkedLine, plot_lines
from trimtab.runs.results import Result
from trimtab.runs.tables import INTERVAL, NUMBER, SIGNED, Cell, Column, Table
from trimtab.stats import Interval, number_text
from trimtab.steering.ordinary_texts import Fluency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType

FOUND, RANDOM, SINGLE = "found", "random", "best single"
"""Names of what was found by causal search, of random features that went through the same choice, and of the best
single feature where a set was found."""
SHOWN_TEXTS = 6
Origin = Literal["gradient", "reads", "removal", "together", "random"]
"""What put an edit among the candidates; `together`: several features."""
HARDLY_DIFFER = "wanted and unwanted texts hardly differ"
"""How a note begins about a wish whose texts do not state it."""
NAMED = 3
"""Directions that a label names."""


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
    first_order: float | None = None
    """The effect at its dose that the gradient predicts."""
    writes: Interval | None = None
    """Its exact effect by itself at its dose, if it was measured."""


@dataclass(frozen=True, kw_only=True)
class ScoredFeature(SteeredPart):
    """A single feature that was screened on the first of the choice's examples, at about the dose of the budget."""

    origin: Origin
    """Why it was scored."""


@dataclass(frozen=True, kw_only=True)
class RankedFeatures:
    """The features of a site that the gradient puts first."""

    site: str
    feature: tuple[int, ...]
    effect: tuple[float, ...]
    """First-order change of the score per unit of relative dose; below 0 for features to subtract."""
    certainty: tuple[float, ...]
    """The same in units of its standard error, that of the median feature added."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the gradient's ranking is the exact one."""

    dose: float
    """Mean over features."""
    spearman: Interval
    """Over features, the random ones included."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An edit at one strength, on what chose nothing."""

    dose: float | None
    """Relative, of all directions together; None where it has none, and the mean over draws of random features."""
    effect: Interval
    """On the wish, over the report's examples."""
    kl: Interval
    """KL(steered ‖ unsteered), over neutral prompts, in nats per token."""


@dataclass(frozen=True, kw_only=True)
class WrittenEffect:
    """Texts on neutral prompts at the strength of equal price."""

    read: Interval | None
    """Share of texts in which the judge finds the wish, or the mean of what it reads; None without a judge."""
    change: Interval | None
    """What the judge reads, above the unsteered texts, paired."""
    fluency: Fluency
    """How ordinary they are."""


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
    own: Measured | None
    """As it was chosen, within the budget; None for an alternative that is shown at the price of what was found."""
    equal_dose: Measured | None
    """At the dose of what was found; None where doses have no meaning."""
    equal_kl: Measured | None
    """At the price of what was found on the report's neutral text; None where no dose comes to it."""
    behind: Interval | None
    """The effect of what was found minus this one's at equal price, paired by example; None for itself."""
    behind_at_dose: Interval | None
    """The same at equal dose."""
    written: WrittenEffect

    @property
    def shown(self) -> Measured:
        """At the price of what was found; as it was chosen where no dose comes to that."""
        found = self.equal_kl or self.own
        assert found is not None
        return found

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
        shown = [name + dose for name, dose in zip(named, doses, strict=True)]
        more = f" and {len(shown) - NAMED} more" if len(shown) > NAMED + 1 else ""
        return ", ".join(shown[:NAMED] if more else shown) + more


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
    unit: str
    """Of what it reads in a text."""
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
    """Single ones that were scored exactly, best first."""
    agreement: tuple[Agreement, ...]
    ranked: tuple[RankedFeatures, ...]
    """By the gradient alone, of each site."""
    ways: tuple[WayResult, ...]
    curse: Interval
    """Winner's curse: the effect of what was found on the examples that chose it, in the precision that chose, minus
    that on the report's, in the model's own."""
    judge: Judged
    texts: tuple[WrittenTexts, ...]
    missing: dict[str, str]
    """Alternatives that could not be had, and why."""
    seed: int
    seconds: dict[str, float]
    """That each stage took."""
    about: str = ""
    """What was wished for in a few words, where it was stated so."""

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
        """Whether features serve the wish: above nothing, and above the mean of several draws of random ones that went
        through the same choice."""
        return self.found.shown.effect.low > 0 and self.over_random.low > 0

    @property
    def over_random(self) -> Interval:
        """The effect of what was found minus that of random features, at equal dose where doses have a meaning."""
        found = self.random.behind_at_dose or self.random.behind
        assert found is not None
        return found


@dataclass(frozen=True, kw_only=True, repr=False)
class Found(FoundFacts, Result):
    """What a search found. `source` steers with it."""

    source: Any = field(default=None, compare=False)
    """A `StaticSource` for `decode`, `applied` and `steer`."""
    run: Path | None = None

    def headline(self) -> str:
        found, random = self.found, self.random
        effect = f"{number_text(found.shown.effect, '+.3g')} {self.unit}"
        price = f"KL {number_text(found.shown.kl, '.3g')} nats per token"
        about = f" ({self.about})" if self.about and self.about not in self.unit else ""
        if not self.yes:
            return (
                f"No{about}: no feature is shown to serve the wish. The best one chosen, {found.label}, has an effect "
                f"of {effect} on {self.counts['report']} examples that chose nothing; random features chosen likewise "
                f"{number_text((random.equal_dose or random.shown).effect, '+.3g')}"
            )
        change = found.written.change
        read = ""
        if change is not None:
            where = "; in generated text" if change.low > 0 else "; generated text does not show it:"
            read = f"{where} {number_text(change, '+.2f')} {self.judge.unit}"
        over = " (more than the budget, on other text)" if found.shown.kl.estimate > self._most else ""
        return (
            f"Yes{about}: {found.label}: {effect} on {self.counts['report']} examples that chose nothing, "
            f"{number_text(self.over_random, '+.3g')} above random features"
            f"{' at equal dose' if random.behind_at_dose else ''}, {price}{over}{read}"
            f"{''.join(f'; {said}' for said in self._qualifications())}"
        )

    def _qualifications(self) -> list[str]:
        """What a reader of a *yes* is to know."""
        said = list[str]()
        if self.random.behind is not None and self.random.behind_at_dose is not None and self.random.behind.low <= 0:
            said.append(f"at equal price not shown to be above them ({number_text(self.random.behind, '+.3g')})")
        better = [way for way in self.ways if way.behind is not None and way.behind.high < 0]
        if better:
            said.append(f"{' and '.join(way.name for way in better)} {'does' if len(better) == 1 else 'do'} more")
        return said + [note for note in self.notes if HARDLY_DIFFER in note]

    def render(self) -> RenderableType:
        """For the terminal, with where it lies and what to do next."""
        if self.run is None:
            return super().render()
        from rich.console import Group
        from rich.text import Text

        next_ = f"run {self.run}, page {self.run / 'report.html'}; steer with it: trimtab steer … --with {self.run}"
        return Group(super().render(), Text(next_, style="dim"))

    def tables(self) -> dict[str, Table]:
        return {
            "ways": self._ways(),
            "found": self._parts(),
            "written": self._written(),
            "texts": self._texts(),
            "stages": self._stages(),
            "features": self._features(),
        }

    @property
    def _most(self) -> float:
        return FindOptions(budget=self.budget).most_kl

    def _ways(self) -> Table:
        columns = [
            Column("way", "name", whole=True),
            Column("steers with", "label"),
            Column("effect", "shown.effect", SIGNED, note=self.unit),
            Column("KL", "shown.kl", INTERVAL, note="nats per token"),
            Column("found minus this", "behind", SIGNED, spare=1),
            Column("at equal dose", "equal_dose.effect", SIGNED, spare=2),
            Column("reads (AUC)", _auc, ".2f", spare=3),
            Column("tried", "tried", "d", spare=4),
        ]
        caption = (
            f"All chosen on {self.counts['choice']} examples within {self.budget} on neutral text for choosing "
            f"(where no instruction is, the cheapest), shown on {self.counts['report']} examples that chose nothing, "
            f"at the price of what was found, on other neutral text; where no dose comes to it{self._dearer}, as "
            f"chosen. Found minus this: paired by example, at that price. Reads: how often the feature fires more on a "
            f"wanted answer than on an unwanted one. Random: the mean of {self._draws}. Winner's curse of what was "
            f"found: {number_text(self.curse, '+.3g')}. "
            + " ".join([*(f"{name}: {why}." for name, why in self.missing.items()), *(f"{n}." for n in self.notes)])
        )
        return Table(columns=columns, rows=self.ways, caption=caption.strip(), emphasis=self.found)

    @property
    def _dearer(self) -> str:
        """Which ways are at another price."""
        names = [way.name for way in self.ways if way.equal_kl is None]
        return f" ({', '.join(names)})" * bool(names)

    @property
    def _draws(self) -> str:
        draws = len(self.random.parts)
        return f"{draws} draws of features, each draw's best" if draws > 1 else "one draw of features, its best"

    def _parts(self) -> Table:
        columns = [
            Column("feature", _place, whole=True),
            Column("dose", _dose),
            *_WORDS,
            Column("reads: difference", "reads", NUMBER),
            Column("reads: AUC", "auc", ".2f"),
            Column("writes, by gradient", "first_order", "+.3g", spare=1),
            Column("writes by itself", "writes", SIGNED, note=self.unit),
        ]
        return Table(columns=columns, rows=self.found.parts, title="what was found")

    def _written(self) -> Table:
        columns = [
            Column("way", "name", whole=True),
            Column("read in texts", "written.read", ".2f"),
            Column("change", "written.change", "+.2f", note=self.judge.unit),
            Column("ordinary", "written.fluency.ordinary", ".2f", note="share of texts"),
            Column("4-gram repetition", "written.fluency.repetition", ".3f", spare=1),
        ]
        accuracy = f", right on {number_text(self.judge.accuracy, '.2f')} of other texts" if self.judge.accuracy else ""
        read = f"Read by {self.judge.name}{accuracy}" if self.judge.name else self.judge.missing
        what = (
            "Ordinary and repetition are of texts on neutral prompts"
            if self.wish == "task"
            else "Texts on neutral prompts"
        )
        caption = f"{what} at equal KL. {read}."
        return Table(columns=columns, rows=self.ways, caption=caption)

    def _texts(self) -> Table:
        names = dict.fromkeys(name for one in self.texts for name in one.texts)
        columns = [Column("prompt", "prompt")]
        columns += [Column(name, _text_by(name), spare=max(i - 1, 0)) for i, name in enumerate(names)]
        return Table(columns=columns, rows=self.texts, caption="Texts on neutral prompts, steered at equal KL.")

    def _stages(self) -> Table:
        columns = [Column("mean dose", "dose", NUMBER), Column("Spearman's correlation", "spearman", ".2f")]
        caption = f"Gradient and exact effect of {self.agreement[0].spearman.n} features, random ones included."
        return Table(columns=columns, rows=self.agreement, caption=caption)

    def _features(self) -> Table:
        columns = [
            Column("feature", _place, whole=True),
            Column("dose", _dose),
            Column("from", "origin", spare=5),
            *_WORDS,
            Column("reads: AUC", "auc", ".2f"),
            Column("by gradient", "first_order", "+.3g", spare=1),
            Column("writes", "writes", SIGNED, note=self.unit),
        ]
        caption = (
            f"On {self.counts['screening']} of the examples to choose on, at about the dose that the budget allows. "
            "Reads: how often it fires more on a wanted answer."
        )
        return Table(columns=columns, rows=self.features[:20], caption=caption)

    def draw(self, ax: Axes) -> None:
        """Effect against price, a line for each way; what was chosen is marked."""
        lines: list[MarkedLine] = []
        for way in self.ways:
            points = {(0.0, 0.0)}
            for one in (way.shown, way.equal_dose):
                if one is not None:
                    points.add((one.kl.estimate, one.effect.estimate))
            mark = way.shown.kl.estimate, way.shown.effect.estimate
            lines.append(MarkedLine(way.name, sorted(points), mark, way.name == FOUND))
        plot_lines(ax, lines, "KL to unsteered, nats per token", f"effect, {self.unit}")

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
        facts = {name: getattr(self, name) for name in FoundFacts.__dataclass_fields__}
        return {**json_safe(facts), "yes": self.yes, "run": None if self.run is None else str(self.run)}


def _auc(way: WayResult) -> Cell:
    known = [part.auc for part in way.parts if part.auc is not None]
    return max(known, key=lambda value: abs(value - 0.5)) if known else None


def _dose(row: SteeredPart) -> str:
    return f"{row.dose:+.2g}" if row.dose else "removed"


def _text_by(way: str) -> Callable[[WrittenTexts], str | None]:
    return lambda row: row.texts.get(way)


def _place(row: SteeredPart) -> str:
    """By which the page leads to what is known of a feature."""
    return f"{row.site} vector" if row.feature is None else f"{row.site}:{row.feature}"


def _fires_on(row: SteeredPart) -> str:
    if row.words is None:
        return ""
    return row.words.meaning or " ".join(map(_visible, row.words.fires_on))


def _promotes(row: SteeredPart) -> str:
    return "" if row.words is None else " ".join(map(_visible, row.words.promotes))


def _visible(token: str) -> str:
    return token.strip() or repr(token)


_WORDS = (Column("means or fires on", _fires_on, spare=6), Column("promotes", _promotes))
