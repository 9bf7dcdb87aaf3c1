"""The lines that a policy stands between: of one SAE, dose and mask, and of several side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from trimtab.policies.headroom.table import Scheme
from trimtab.runs import json_safe
from trimtab.runs.tables import Column, result_table
from trimtab.stats import Interval

CAPTION = (
    "In brackets: how many of those tried the mask allows, on average. random: expected best of as many random "
    "directions as the mask allows features of the item. static: one feature for all, cross-fitted. readout: "
    "ridge regression from the activation picks, cross-fitted. 95% intervals over items."
)


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """Mean rewards over items, with 95% intervals bootstrapped over items."""

    site: str
    dose: float
    unit: str
    mask: str
    items: int
    features: int
    """How many were tried."""
    of_features: int
    """How many the dictionary has."""
    candidates: str
    """How those tried were chosen: `all`, `top-confidence` or `random`."""
    scheme: Scheme
    allowed_per_item: float
    """How many of those tried the mask allows at the last prompt token, on average."""
    random_per_item: float
    """How many random directions stand against them, on average: as many, unless fewer were tried."""
    unsteered: Interval
    ceiling: Interval
    """The best allowed feature of each item among those tried, or no edit."""
    random_ceiling: Interval
    """The best of as many random directions as the mask allows features of the item, or no edit."""
    static: Interval
    """The best single feature, cross-fitted."""
    most_active: Interval
    """Each item's most active allowed feature."""
    readout: Interval
    """The feature that a cross-fitted regression from the activation picks, no edit among the choices."""
    flipped_by_static: Interval
    """Share of items whose reward the static feature changes at all."""

    @property
    def over_static(self) -> float:
        """What a policy could gain over the best static feature, at most and as far as features were tried."""
        return self.ceiling.estimate - max(self.static.estimate, self.unsteered.estimate)

    @property
    def ceiling_is_lower_bound(self) -> bool:
        """Whether a feature that was not tried may do better."""
        return self.features < self.of_features

    def warnings(self) -> tuple[str, ...]:
        """What speaks against training a policy here."""
        found = []
        if self.unsteered.estimate >= 1:
            found.append("no headroom: the unsteered model already gets every item right")
        elif self.ceiling.estimate <= self.unsteered.estimate:
            if self.ceiling_is_lower_bound:
                which = f"none of the {self.features:,} features tried, of {self.of_features:,},"
                found.append(f"no headroom seen: {which} makes any wrong item right at this dose")
            else:
                found.append("no headroom: no feature at this dose makes any wrong item right")
        elif self.over_static <= 0:
            seen = f" of the {self.features:,} features tried" if self.ceiling_is_lower_bound else ""
            found.append(f"nothing to learn: the best static feature reaches the ceiling{seen}")
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class HeadroomResult:
    """Lines for every SAE, dose and mask."""

    task: str
    model: str
    split: str
    lines: tuple[Headroom, ...]
    task_option: tuple[str, ...] = ()
    judge: str | None = None
    """As given; None for the task's own default."""

    def render(self) -> Table:
        """One row for each SAE, dose and mask."""
        first, sites = self.lines[0], {line.site for line in self.lines}
        held = first.scheme == "every answer token"
        title = [
            f"headroom of {self.task} on {self.model}: mean reward of {first.items} items ({self.split})",
            *[first.site] * (len(sites) == 1),
            "one feature held over the whole answer" if held else "one edit at the last prompt token",
        ]
        columns = [
            *[Column("site", "site", whole=True)] * (len(sites) > 1),
            Column("dose", "dose", "g"),
            Column("mask", lambda line: f"{line.mask} ({line.allowed_per_item:,.0f})"),
            Column("unsteered", "unsteered", ".2f"),
            Column("ceiling", "ceiling", ".2f"),
            Column("random", "random_ceiling", ".2f"),
            Column("static", "static", ".2f"),
            Column("most active", "most_active", ".2f"),
            Column("readout", "readout", ".2f"),
        ]
        warnings = dict.fromkeys(
            f"{line.site}, dose {line.dose:g}, mask {line.mask}: {warning}"
            for line in self.lines
            for warning in line.warnings()
        )
        caption = f"ceiling: best allowed feature of each item{self._tried}. {CAPTION}"
        return result_table(columns, self.lines, title=", ".join(title), caption="\n".join([caption, *warnings]))

    def to_json(self) -> dict[str, Any]:
        """The lines as plain values."""
        lines = [
            vars(line)
            | {"over_static": line.over_static, "ceiling_is_lower_bound": line.ceiling_is_lower_bound,
               "warnings": line.warnings()}
            for line in self.lines
        ]  # fmt: skip
        return json_safe(vars(self) | {"lines": lines})

    @property
    def _tried(self) -> str:
        """Which features the ceilings are over, where not all were tried."""
        few = [line for line in self.lines if line.ceiling_is_lower_bound]
        if not few:
            return ""
        counts = sorted({line.features for line in few})
        tried = " to ".join(map(str, counts if len(counts) == 1 else [counts[0], counts[-1]]))
        return (
            f" among {tried} tried of {few[0].of_features:,} (candidates: {few[0].candidates}), a lower bound on the "
            "ceiling over all"
        )
