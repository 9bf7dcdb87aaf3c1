"""Several finished searches side by side: for how many wishes features were found, and how other ways compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from trimtab.errors import UserError
from trimtab.finding.finding import COMMAND as FIND
from trimtab.finding.result import FOUND, SINGLE, FoundFacts, WayResult
from trimtab.runs import Run, config_directory, read_record, read_typed, text_id
from trimtab.runs.results import Result
from trimtab.runs.shown import Shown, write_shown
from trimtab.runs.tables import INTERVAL, SIGNED, Column, Table
from trimtab.stats import Interval, bootstrap_mean, number_text

COMMAND = "evaluate wishes"
LEAST = 2
_NOT_THE_RESULT = ("run",)


@dataclass(frozen=True, kw_only=True)
class WishesConfig:
    """Compare ways of control over wishes, from finished runs of `trimtab find`."""

    runs: tuple[Path, ...] = field(default=(), metadata={"heading": ""})
    """Finished runs, each of another wish; their directories' names are the wishes'."""
    seed: int = 0
    """Of the intervals over wishes."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config."""


@dataclass(frozen=True, kw_only=True)
class ComparedWish:
    """What one search came to."""

    wish: str
    yes: bool
    label: str
    n: int
    """Examples that chose nothing."""
    effect: Interval
    kl: Interval
    random: Interval
    """Effect of random features at the dose of what was found."""
    single: Interval | None
    """Effect of the best single feature as it was chosen, where a set was found."""
    change: Interval | None
    """In generated text, as the judge reads it."""
    curse: Interval
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ComparedWay:
    """One way beside what causal search found, over wishes."""

    way: str
    effect: Interval
    """Mean effect over wishes, at equal price where it can be had, or else as chosen."""
    priced: int
    """Wishes for which equal price could be had."""
    difference: Interval
    """What was found minus this, paired by wish."""
    ahead: int
    """Wishes for which the interval of that difference over examples is above 0."""
    behind: int
    """Wishes for which it is below 0."""
    kl: Interval
    """Price, over wishes."""
    change: Interval | None
    """In generated text, over wishes."""


@dataclass(frozen=True, kw_only=True, repr=False)
class WishComparison(Result):
    """Ways of control over wishes."""

    unit: str
    model: str
    wishes: tuple[ComparedWish, ...]
    ways: tuple[ComparedWay, ...]
    judged: str
    """What the change in generated text is in; empty if that differs."""
    left_out: tuple[str, ...]
    """Ways that some wish has not."""
    run: Path | None = None

    def headline(self) -> str:
        yes = sum(wish.yes for wish in self.wishes)
        others = "; ".join(f"{w.way} {number_text(w.difference, '+.3g')}" for w in self.ways if w.way != FOUND)
        return (
            f"Features are found for {yes} of {len(self.wishes)} wishes. What was found minus other ways, {self.unit}, "
            f"paired over wishes: {others}"
        )

    def tables(self) -> dict[str, Table]:
        return {"ways over wishes": self._ways(), "each wish": self._wishes()}

    def _ways(self) -> Table:
        columns = [
            Column("way", "way", whole=True),
            Column("effect", "effect", SIGNED, note=self.unit),
            Column("found minus this", "difference", SIGNED, note=self.unit),
            Column("ahead", "ahead", "d", note="wishes"),
            Column("behind", "behind", "d", note="wishes"),
            Column("KL", "kl", INTERVAL, note="nats per token"),
            Column("at equal price", "priced", "d", note="wishes", spare=2),
            Column("change in texts", "change", SIGNED, note=self.judged, spare=1),
        ]
        caption = (
            f"{len(self.wishes)} wishes, 95% intervals over them; at the price of what was found, or as chosen where "
            "that cannot be had, as for prompting. Ahead and behind: wishes for which the interval over examples "
            "excludes 0."
        )
        if self.left_out:
            caption += f" Not had for all wishes, and left out: {', '.join(self.left_out)}."
        return Table(columns=columns, rows=self.ways, caption=caption)

    def _wishes(self) -> Table:
        columns = [
            Column("wish", "wish", whole=True),
            Column("yes", lambda row: "yes" if row.yes else "no"),
            Column("effect", "effect", SIGNED, note=self.unit),
            Column("KL", "kl", INTERVAL, note="nats per token"),
            Column("random", "random", SIGNED, note="at equal dose"),
            Column("best single", "single", SIGNED, note="where a set was found", spare=2),
            Column("change in texts", "change", SIGNED, note=self.judged, spare=1),
            Column("winner's curse", "curse", SIGNED, spare=3),
            Column("seconds", "seconds", ".0f", spare=4),
        ]
        return Table(columns=columns, rows=self.wishes, caption="95% intervals over examples that chose nothing.")


def compare_wishes(runs: Sequence[Path | str], *, seed: int = 0) -> WishComparison:
    """Compare ways of control over wishes, on what chose nothing.

    Args:
        runs: finished runs of `find`, of one model and with effects in one unit.
        seed: of the resampling of wishes.

    Raises:
        UserError: there are fewer than two, one is given twice or is no finished run of `find`, or they differ in
            model or unit.
    """
    paths = [Path(path) for path in runs]
    if len(paths) < LEAST or len({path.resolve() for path in paths}) < len(paths):
        why = "one is given twice" if len(paths) >= LEAST else f"at least {LEAST} are needed"
        raise UserError(f"{len(paths)} runs", why, "give different runs of trimtab find")
    facts = {path: _facts(path) for path in paths}
    for what in ("model", "unit"):
        if len(kinds := sorted({getattr(one, what) for one in facts.values()})) > 1:
            raise UserError("the runs", f"their {what}s are {', '.join(kinds)}", "compare those that are alike")
    wishes = tuple(_wish(path.name, one) for path, one in facts.items())
    names = list(dict.fromkeys(way.name for one in facts.values() for way in one.ways if way.name != SINGLE))
    shared = [name for name in names if all(name in {way.name for way in one.ways} for one in facts.values())]
    units = {one.judge.unit for one in facts.values()}
    first = next(iter(facts.values()))
    return WishComparison(
        unit=first.unit,
        model=first.model,
        wishes=wishes,
        ways=tuple(_way(name, list(facts.values()), seed, judged=len(units) == 1) for name in shared),
        judged=units.pop() if len(units) == 1 else "",
        left_out=tuple(name for name in names if name not in shared),
    )


def _facts(path: Path) -> FoundFacts:
    record = read_record(path)
    if record["command"] != FIND or not record["results"]:
        raise UserError(f"run {path}", "it is no finished run of find", "give finished runs of trimtab find")
    return read_typed(FoundFacts, record["results"], f"run {path}")


def _wish(name: str, one: FoundFacts) -> ComparedWish:
    single = [way for way in one.ways if way.name == SINGLE]
    return ComparedWish(
        wish=name,
        yes=one.yes,
        label=one.found.label,
        n=one.counts["report"],
        effect=one.found.shown.effect,
        kl=one.found.shown.kl,
        random=(one.random.equal_dose or one.random.shown).effect,
        single=single[0].shown.effect if single else None,
        change=one.found.written.change,
        curse=one.curse,
        seconds=sum(one.seconds.values()),
    )


def _way(name: str, facts: Sequence[FoundFacts], seed: int, *, judged: bool) -> ComparedWay:
    ways = [one[name] for one in facts]
    at = [way.shown for way in ways]

    def over_wishes(values: Sequence[float]) -> Interval:
        return bootstrap_mean(np.array(values), seed=seed)

    def apart(test: Callable[[Interval], bool]) -> int:
        return sum(way.behind is not None and test(way.behind) for way in ways)

    changes = [way.written.change.estimate for way in ways if way.written.change is not None]
    return ComparedWay(
        way=name,
        effect=over_wishes([one.effect.estimate for one in at]),
        priced=sum(way.equal_kl is not None for way in ways),
        difference=over_wishes([_behind(way) for way in ways]),
        ahead=apart(lambda interval: interval.low > 0),
        behind=apart(lambda interval: interval.high < 0),
        kl=over_wishes([one.kl.estimate for one in at]),
        change=over_wishes(changes) if judged and len(changes) == len(ways) else None,
    )


def _behind(way: WayResult) -> float:
    return 0.0 if way.behind is None else way.behind.estimate


def run_wishes(config: WishesConfig) -> WishComparison:
    """What `trimtab evaluate wishes` does.

    Raises:
        UserError: see `compare_wishes`.
    """
    directory = config.run or config_directory(COMMAND, config, ignore=_NOT_THE_RESULT)
    with Run.open(directory, COMMAND, config, seeds=[config.seed], ignore_fields=_NOT_THE_RESULT) as run:
        found = compare_wishes(config.runs, seed=config.seed)
        run.record(hashes={str(path): text_id(json.dumps(read_record(path)["results"])) for path in config.runs})
        if not run.done:
            write_shown(run, [Shown.of("Wishes", found)])
            run.finish(found)
    return replace(found, run=run.path)
