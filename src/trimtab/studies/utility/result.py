"""What a study of utility comes to: the SAEs with their scores, how these rank alike, and what selection adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trimtab.interpreting.agreement import RankAgreement
from trimtab.interpreting.calibration import right_on
from trimtab.interpreting.nested_selection import MeanLift, MeanPair
from trimtab.interpreting.scored_sae import ScoredSAE
from trimtab.runs.figures import Point, plot_points
from trimtab.runs.results import Result
from trimtab.runs.shown import Shown
from trimtab.runs.tables import INTERVAL, SIGNED, Column, Table
from trimtab.stats import Interval, number_text, student_mean
from trimtab.training.result import L0_TOLERANCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class FailedCell(NamedTuple):
    """An SAE, or a bank of them, of which something is missing."""

    what: str
    stage: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class StudiedSAE(ScoredSAE):
    """One SAE, with what its training came to."""

    l0: float
    """That it reached."""

    @property
    def missed(self) -> bool:
        """Whether that is more than a tenth away from what was asked for."""
        return abs(self.l0 - self.sparsity) > L0_TOLERANCE * self.sparsity


@dataclass(frozen=True, kw_only=True, repr=False)
class UtilityStudy(Result):
    """All that was measured of the SAEs."""

    run: str
    judge: str
    judge_accuracy: Interval | None
    """Of its decisions whether labelled texts have their concept, where they were measured."""
    saes: tuple[StudiedSAE, ...]
    agreement: RankAgreement | None
    """None where scores cannot be ranked."""
    unranked: str
    """Why not."""
    lifts: tuple[MeanLift, ...]
    """Of criteria over SAEs."""
    pairs: tuple[MeanPair, ...]
    """Of criteria, the one over the other."""
    failed: tuple[FailedCell, ...]
    features: int
    """Of each SAE, at most."""

    def headline(self) -> str:
        lifts = "; ".join(f"{one.criterion} {number_text(one.lift, '+.3f')}" for one in self.lifts)
        lift = f"the features that criteria choose elsewhere steer better than all, of 2, by: {lifts}"
        gaps = f" {len(self.failed)} are missing." * bool(self.failed)
        said = self.unranked if self.agreement is None else self.agreement.headline()
        return f"{said} Mean over SAEs: {lift}.{gaps}"

    def tables(self) -> dict[str, Table]:
        names = list(self.saes[0].selected)
        saes = [
            Column("model", "model"),
            Column("architecture", "architecture"),
            Column("L0 asked for", "sparsity", "g"),
            Column("reached", "l0", ".1f"),
            Column("interpretability", "interpretability", ".3f"),
            Column("utility", "utility", ".3f"),
            *(Column(f"after {name}", _selected(name), ".3f") for name in names),
            Column("explained variance", "explained_variance", ".3f", spare=1),
            Column("dead", "dead_share", ".3f", spare=2),
        ]
        lifts = [
            Column("criterion", "criterion"),
            Column("lift", "lift", SIGNED, note="chosen elsewhere"),
            Column("lift, best kept", "kept_lift", SIGNED),
            Column("random, best kept", "random_kept", "+.3f"),
            Column("winner's curse", "curse", SIGNED),
        ]
        pairs = [
            Column("criterion", "criterion"),
            Column("over", "over"),
            Column("difference", "difference", SIGNED, note="chosen elsewhere"),
            Column("difference, best kept", "kept_difference", SIGNED),
        ]
        caption = (
            f"Utility of the features that a criterion selects among {self.features}, less that of all; direction, "
            "share and dose are chosen on other features and instructions. Intervals over SAEs. Judge: "
            f"{self.judge}, {right_on(self.judge_accuracy)}."
        )
        off = sum(sae.missed for sae in self.saes)
        missed = (
            f"{off} of {len(self.saes)} are more than a tenth off the L0 asked for, by which they are grouped."
            * bool(off)
        )
        scores = [
            Column("score", "score"),
            Column("mean", "own", INTERVAL),
            Column("with another feature's meaning", "other", INTERVAL),
            Column("difference", "difference", SIGNED),
        ]
        found = {
            "scores": Table(columns=scores, rows=list(self._scores()), caption="Means, with intervals over SAEs."),
            "SAEs": Table(columns=saes, rows=self.saes, caption=missed),
            "lifts": Table(columns=lifts, rows=self.lifts, caption=caption),
            "pairs": Table(columns=pairs, rows=self.pairs, caption="On the same features. Intervals over SAEs."),
            **(self.agreement.tables() if self.agreement is not None else {}),
        }
        if self.failed:
            columns = [Column("missing", "what"), Column("stage", "stage"), Column("why", "reason")]
            found["missing"] = Table(columns=columns, rows=self.failed)
        return found

    def _scores(self) -> Iterator[dict[str, Any]]:
        """Both scores, beside what the judge says where features exchange their meanings."""
        for name in ("interpretability", "utility"):
            own = np.array([getattr(sae, name) for sae in self.saes])
            other = np.array([getattr(sae, f"{name}_shuffled") for sae in self.saes], dtype=float)
            if np.isfinite(other).all():
                found = {"own": own, "other": other, "difference": own - other}
                yield {"score": name, **{key: student_mean(values) for key, values in found.items()}}

    def draw(self, ax: Axes) -> None:
        """Interpretability and utility, a point for each SAE."""
        points = [Point(sae.interpretability, sae.utility, sae.architecture) for sae in self.saes]
        plot_points(ax, points, "interpretability", "utility", diagonal=False)

    def shown(self) -> Sequence[Shown]:
        """Sections of the page."""
        figures = {"Interpretability and utility before selection, a point for each SAE": self.draw}
        if self.agreement is not None:
            figures["Kendall's τ, before selection"] = self.agreement.draw
        return [Shown.of("Interpretability against utility", self, figures)]


def _selected(name: str) -> Any:
    return lambda sae: sae.selected[name]
