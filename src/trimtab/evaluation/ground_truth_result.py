"""The result of a ground-truth benchmark: scores of every dictionary on every data set, ranked, with intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from trimtab.evaluation.ground_truth_scores import LABELS
from trimtab.runs.tables import Column, text_table
from trimtab.stats import Interval, number_text, student_mean
from trimtab.training.result import L0_TOLERANCE, reached

Kind = Literal["trained", "control"]
HEADINGS = {
    "f1": "F1",
    "recovered": "recovered",
    "true_to_learned": "cos →",
    "learned_to_true": "cos ←",
    "magnitude_correlation": "magn. r",
    "splitting": "split",
    "absorption": "absorbed",
    "l0": "L0",
    "explained_variance": "EV",
}
"""The scores of the table and their headings; all are in the JSON form."""
_LEGEND = (
    "F1: of a matched feature's firing, mean over true features; recovered: share of true features whose match has a "
    "cosine of at least {threshold:g}; cos →, ←: largest cosine of true with learned features, of learned with true "
    "ones; magn. r: correlation of code and true magnitude where the feature fires; split: learned features per true "
    "one; absorbed: rows on which a parent's latent is silent and its child's stands in for it. ±: half of a 95% "
    "interval (Student) over data sets, which also seed the training; behind: {rank_by} below the best's, paired by "
    "data set."
)
_OFF_TARGET = "≠"
_OFF_TARGET_LEGEND = (
    f"{_OFF_TARGET}: its L0 is more than {L0_TOLERANCE:.0%} off the one asked for, so that it is not ranked at equal "
    "L0."
)
_TOO_SMALL = (
    "No architecture recovered a true feature: the setting is too small to rank. Train on more rows (--rows), or plant "
    "fewer features (--n-true)."
)
_SHOWN_AS_0 = 0.0005


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One dictionary on one data set."""

    dictionary: str
    """Architecture, or what a control is."""
    kind: Kind
    l0_target: float
    """Active features per row that were asked for; a control that has none is in every group."""
    data_seed: int
    scores: dict[str, float | None]
    """By name; None where there is nothing to score. Empty if training failed."""
    error: str = ""
    """Why training failed."""


class Entry(NamedTuple):
    """One dictionary over all data sets."""

    dictionary: str
    kind: Kind
    scores: dict[str, Interval]
    """Those that have a value on any data set."""
    behind: Interval | None
    """How far the ranking score lies below the best's, paired by data set; None for the best and for controls."""

    def missed(self, l0_target: float) -> bool:
        """Whether it was trained to an L0 and ended at another one."""
        return self.kind == "trained" and "l0" in self.scores and not reached(self.scores["l0"].estimate, l0_target)


@dataclass(frozen=True, kw_only=True)
class GroundTruthResult:
    """Dictionaries ranked by how well they find features that are known."""

    description: str
    """The data and the training in words."""
    rank_by: str
    """The score that ranks."""
    threshold: float
    scored: tuple[Scored, ...]
    run: Path | None = None
    resumed: bool = False
    """Whether the run was done before."""

    @property
    def l0_targets(self) -> list[float]:
        """The numbers of active features that were asked for."""
        return sorted({one.l0_target for one in self.scored})

    def entries(self, l0_target: float) -> list[Entry]:
        """Trained dictionaries from the best to the worst, then controls."""
        of: dict[tuple[Kind, str], dict[int, Scored]] = {}
        for one in self.scored:
            if one.l0_target == l0_target and not one.error:
                of.setdefault((one.kind, one.dictionary), {})[one.data_seed] = one
        intervals = {key: _intervals(found.values()) for key, found in of.items()}
        controls = [key for key in of if key[0] == "control"]
        trained = sorted(
            (key for key in of if key[0] == "trained"),
            key=lambda key: -intervals[key][self.rank_by].estimate if self.rank_by in intervals[key] else math.inf,
        )
        return [
            Entry(name, kind, intervals[kind, name], self._behind(of[trained[0]], of[kind, name]))
            if kind == "trained" and (kind, name) != trained[0]
            else Entry(name, kind, intervals[kind, name], None)
            for kind, name in (*trained, *controls)
        ]

    def render(self) -> str:
        """One table for each L0, the legend, and what failed."""
        parts = [self.description + (" (done before)" if self.resumed else "")]
        missed = False
        for l0 in self.l0_targets:
            entries = self.entries(l0)
            missed |= any(entry.missed(l0) for entry in entries)
            parts.append(f"L0 {l0:g}, ranked by {LABELS[self.rank_by]}\n" + self._table(entries, l0))
            trained = (entry.scores.get("recovered") for entry in entries if entry.kind == "trained")
            recovered = [value.estimate for value in trained if value is not None]
            if recovered and max(recovered) < _SHOWN_AS_0:
                parts.append(_TOO_SMALL)
        legend = _LEGEND.format(threshold=self.threshold, rank_by=LABELS[self.rank_by])
        parts.append(f"{legend} {_OFF_TARGET_LEGEND}" if missed else legend)
        for one in (one for one in self.scored if one.error):
            parts.append(f"failed: {one.dictionary}, L0 {one.l0_target:g}, data set {one.data_seed}: {one.error}")
        if self.run is not None:
            parts.append(f"run: {self.run}")
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values: intervals by L0 and dictionary, and the scores on each data set."""
        return {
            "description": self.description,
            "rank_by": self.rank_by,
            "threshold": self.threshold,
            "run": None if self.run is None else str(self.run),
            "ranking": {f"{l0:g}": [_entry_json(entry, l0) for entry in self.entries(l0)] for l0 in self.l0_targets},
            "scored": [dataclasses.asdict(one) for one in self.scored],
        }

    def _table(self, entries: list[Entry], l0_target: float) -> str:
        behind = any(entry.behind for entry in entries)
        ranks = {entry.dictionary: rank for rank, entry in enumerate(entries, start=1) if entry.kind == "trained"}

        def named(entry: Entry) -> str:
            rank = f"{ranks[entry.dictionary]}." if entry.kind == "trained" else "  "
            return f"{rank} {entry.dictionary}" + f" {_OFF_TARGET}" * entry.missed(l0_target)

        columns = [
            Column("", named),
            *(Column(t, lambda entry, n=name: _cell(entry.scores.get(n)), ".3f") for name, t in HEADINGS.items()),
            *[Column("behind", lambda entry: _cell(entry.behind), ".3f")] * behind,
        ]
        return text_table(columns, entries)

    def _behind(self, best: dict[int, Scored], other: dict[int, Scored]) -> Interval | None:
        gaps = [
            mine - theirs
            for seed in sorted(best.keys() & other.keys())
            if (mine := best[seed].scores[self.rank_by]) is not None
            and (theirs := other[seed].scores[self.rank_by]) is not None
        ]
        return student_mean(gaps) if gaps else None


def _intervals(found: Iterable[Scored]) -> dict[str, Interval]:
    """Over data sets; one on which a score does not exist is left out."""
    values: dict[str, list[float]] = {}
    for one in found:
        for name, value in one.scores.items():
            if value is not None and np.isfinite(value):
                values.setdefault(name, []).append(value)
    return {name: student_mean(each) for name, each in values.items()}


def _cell(value: Interval | None) -> str | Interval | None:
    """Half of the interval beside the estimate, to keep the table narrow."""
    if value is None or math.isnan(value.low):
        return value
    estimate, half = (number_text(number, ".3f") for number in (value.estimate, value.high - value.estimate))
    return f"{estimate} ±{half}".replace("±0.", "±.")


def _entry_json(entry: Entry, l0_target: float) -> dict[str, Any]:
    return {
        "dictionary": entry.dictionary,
        "kind": entry.kind,
        "scores": {name: interval.to_dict() for name, interval in entry.scores.items()},
        "missed_l0": entry.missed(l0_target),
        "behind": None if entry.behind is None else entry.behind.to_dict(),
    }
