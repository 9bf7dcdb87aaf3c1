"""What the demo found: of each wish, and of the policy that it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.finding import Found
from trimtab.finding.options import SPLITS
from trimtab.finding.result import FOUND, SINGLE, Measured, WayResult
from trimtab.runs.results import Result
from trimtab.runs.tables import INTERVAL, SIGNED, Column, Table
from trimtab.stats import Interval
from trimtab.studies.marking import RULE, UNSTEERED, Marks

NO_ALTERNATIVE = (FOUND, SINGLE)


@dataclass(frozen=True, kw_only=True)
class DemoWay:
    """A way of steering as the demo's tables and figure show it."""

    name: str
    label: str
    own: Measured | None
    equal_kl: Measured | None

    @property
    def shown(self) -> Measured:
        """At the price of what was found, or as it was chosen where it cannot be had at that price."""
        found = self.equal_kl or self.own
        assert found is not None
        return found


@dataclass(frozen=True, kw_only=True)
class DemoWish:
    """What came of a wish."""

    title: str
    stated: str
    """In what form it was stated, on how many examples."""
    yes: bool
    headline: str
    unit: str
    words: tuple[str, ...]
    """What each feature that was found fires on and promotes."""
    ways: tuple[DemoWay, ...]
    """What was found first."""
    best: str
    """The alternative that does most."""
    random: Interval
    """Effect of random features that went through the same choice, at equal dose."""
    change: Interval | None
    """What a judge reads in generated texts, above the unsteered ones."""
    judge: str
    marks: Marks
    seconds: float

    @classmethod
    def of(cls, title: str, found: Found, marks: Marks, best: str) -> DemoWish:
        """From a search and its marked texts."""
        ways = [DemoWay(name=w.name, label=w.label, own=w.own, equal_kl=w.equal_kl) for w in found.ways]
        return cls(
            title=title,
            stated=f"{sum(found.counts[name] for name in SPLITS)} pairs of {found.wish}",
            yes=found.yes,
            headline=found.headline(),
            unit=found.unit,
            words=tuple(str(part.words) for part in found.found.parts if part.words is not None),
            ways=tuple(sorted(ways, key=lambda way: way.name != FOUND)),
            best=best,
            random=(found.random.equal_dose or found.random.shown).effect,
            change=found.found.written.change,
            judge=found.judge.name,
            marks=marks,
            seconds=sum(found.seconds.values()),
        )

    @property
    def found(self) -> DemoWay:
        return self.ways[0]

    @property
    def alternative(self) -> DemoWay:
        """The best of the alternatives."""
        return next(way for way in self.ways if way.name == self.best)

    @property
    def marked(self) -> Mapping[str, Interval]:
        """Share of marked words by what the table calls it."""
        shares = self.marks.shares
        return {"unsteered": shares[UNSTEERED], "found": shares[FOUND], "best": shares[self.best]}


def best_alternative(found: Found) -> WayResult:
    """The way that does most beside what was found, at its price or as it was chosen."""
    others = [way for way in found.ways if way.name not in NO_ALTERNATIVE]
    return max(others, key=lambda way: way.shown.effect.estimate)


@dataclass(frozen=True, kw_only=True)
class PolicyArm:
    """One way of answering the policy's task."""

    label: str
    reward: Interval
    difference: Interval | None
    """The policy's reward minus this, paired by item."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DemoPolicy(Result):
    """What came of the policy."""

    run: str
    task: str
    items: int
    arms: tuple[PolicyArm, ...]
    training_seconds: float
    warnings: tuple[str, ...]

    def headline(self) -> str:
        said = [f"{self.task}, {self.items} test items, trained in {self.training_seconds:.0f} s with one seed"]
        return "; ".join([*said, *self.warnings])

    def tables(self) -> dict[str, Table]:
        columns = [
            Column("arm", "label"),
            Column("reward", "reward", INTERVAL),
            Column("policy − this", "difference", SIGNED),
        ]
        return {"policy": Table(columns=columns, rows=self.arms, caption="95% intervals over items.")}


@dataclass(frozen=True, kw_only=True)
class Trimmed:
    """A size that is another here than where nobody asks for it."""

    option: str
    here: str
    otherwise: str


@dataclass(frozen=True, kw_only=True, repr=False)
class DemoResult(Result):
    """What the demo found."""

    model: str
    run: str
    wishes: tuple[DemoWish, ...]
    trimmed: tuple[Trimmed, ...]
    policy: DemoPolicy | None
    policy_left_out: str
    """Why there is none, if it was asked for and its task does not suit the model or the SAE."""
    seconds: float
    """That all of it took; of runs that were stopped, the last part."""

    def headline(self) -> str:
        yes = [wish.title for wish in self.wishes if wish.yes]
        no = [wish.title for wish in self.wishes if not wish.yes]
        said = [f"{word}: {'; '.join(titles)}" for word, titles in (("Yes", yes), ("No", no)) if titles]
        return ". ".join([*said, *[f"No policy: {self.policy_left_out}"] * bool(self.policy_left_out)])

    def tables(self) -> dict[str, Table]:
        units = ", ".join(dict.fromkeys(wish.unit for wish in self.wishes))
        columns = [
            Column("wish", "title", whole=True),
            Column("shown", lambda wish: "yes" if wish.yes else "no"),
            Column("steers with", "found.label"),
            Column("effect", "found.shown.effect", SIGNED, note=units),
            Column("KL", "found.shown.kl", INTERVAL, note="nats per token"),
            Column("random features", "random", SIGNED, note="at equal dose"),
            Column("best alternative", "best"),
            Column("its effect", "alternative.shown.effect", SIGNED, note="at equal KL if it can be had"),
            Column("its KL", "alternative.shown.kl", INTERVAL, spare=2),
        ]
        caption = "On examples and neutral prompts that chose nothing, 95% intervals."
        sizes = [Column("option", "option"), Column("here", "here"), Column("otherwise", "otherwise")]
        marked = [
            Column("wish", "title", whole=True),
            *(Column(title, f"marked.{name}", ".0%") for name, title in _MARKED.items()),
        ]
        return {
            "wishes": Table(columns=columns, rows=self.wishes, caption=caption),
            "marked words": Table(columns=marked, rows=self.wishes, caption=f"{RULE}. Shares of all words."),
            "trimmed": Table(
                columns=sizes, rows=self.trimmed, caption=f"To take less time: {self.seconds / 60:.1f} minutes in all."
            ),
            **(self.policy.tables() if self.policy else {}),
        }


_MARKED = {"unsteered": "unsteered", "found": "found", "best": "best alternative"}
