"""The exact stage: the best features of each site by the gradient, and as many random ones, scored by edited forwards.

That random ones are among them says what the gradient is worth: the correlation of both stages is over all that were
scored, and is given for each dose, as first order holds for small ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from trimtab.dictionaries.meanings import FeatureWords
from trimtab.finding.first_order import FirstOrder
from trimtab.finding.scoring import Progress, Scorer
from trimtab.finding.steering_edit import Part, SteeringEdit, Tables
from trimtab.lm import Site
from trimtab.stats import Interval, bootstrap_mean, bootstrap_statistic

Sign = Literal["+", "-", "removed"]
Origin = Literal["gradient", "random"]


class Candidate(NamedTuple):
    """A feature, and what is done with it."""

    site: Site
    feature: int
    sign: Sign

    def edit(self, dose: float) -> SteeringEdit:
        """It at a dose, above 0."""
        if self.sign == "removed":
            return SteeringEdit((Part(self.site, self.feature, 0.0),), "ablate")
        return SteeringEdit((Part(self.site, self.feature, dose if self.sign == "+" else -dose),))

    def first_order(self, effects: Mapping[Site, FirstOrder], dose: float) -> float:
        """What the gradient says of it at a dose."""
        found = effects[self.site]
        if self.sign == "removed":
            return float(found.remove[self.feature])
        return float(found.add[self.feature]) * (dose if self.sign == "+" else -dose)


@dataclass(frozen=True, kw_only=True)
class ScoredFeature:
    """A feature with what it reads and what it writes."""

    site: str
    feature: int
    sign: Sign
    """Added, subtracted, or removed where it fires."""
    origin: Origin
    """Why it was scored."""
    words: FeatureWords
    """What it fires on and what it promotes."""
    reads: float
    """Mean activation on wanted answers minus that on unwanted ones; NaN if there are none of a kind."""
    auc: float
    """How often it fires more on a wanted answer than on an unwanted one; NaN if there are none of a kind."""
    first_order: float
    """The effect that the gradient predicts at the first dose."""
    writes: tuple[Interval, ...]
    """Its exact effect at each dose; of a removal, once."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the gradient's ranking is the exact one, at a dose."""

    dose: float
    spearman: Interval
    """Over features, the random ones included."""


def shortlist(
    effects: Mapping[Site, FirstOrder], tables: Tables, per_site: int, seed: int
) -> list[tuple[Candidate, Origin]]:
    """The features of each site that the gradient puts first, and as many live ones at random.

    Args:
        effects: first-order effects by site.
        tables: directions by site, which say what is live.
        per_site: of each site's features, so many additions (of either sign) and half as many removals.
        seed: of the random ones.
    """
    found: dict[Candidate, Origin] = {}
    for number, (site, one) in enumerate(effects.items()):
        live = tables[site].live_ids()
        add = one.add[live]
        for i in live[add.abs().topk(min(per_site, len(live))).indices].tolist():
            found[Candidate(site, i, "+" if one.add[i] > 0 else "-")] = "gradient"
        removed = live[one.remove[live].topk(min(per_site // 2, len(live))).indices].tolist()
        found.update({Candidate(site, i, "removed"): "gradient" for i in removed if one.remove[i] > 0})
        rng = np.random.default_rng([seed, number])
        for i in rng.choice(live.numpy(), min(per_site, len(live)), replace=False).tolist():
            found.setdefault(Candidate(site, i, "+" if rng.random() < 0.5 else "-"), "random")
    return list(found.items())


class ExactScores(NamedTuple):
    """Exact effects of candidates."""

    candidates: list[Candidate]
    doses: tuple[float, ...]
    effects: Float[Tensor, "C D X"]
    """At each dose on each example; a removal's are the same at all."""

    @property
    def mean(self) -> Float[Tensor, "C D"]:
        return self.effects.mean(-1)

    def intervals(self, number: int, seed: int) -> tuple[Interval, ...]:
        """A candidate's effects with intervals over examples."""
        n = 1 if self.candidates[number].sign == "removed" else len(self.doses)
        return tuple(bootstrap_mean(self.effects[number, d].numpy(), n_resamples=2000, seed=seed) for d in range(n))


def exact_scores(
    scorer: Scorer, tables: Tables, candidates: Sequence[Candidate], doses: Sequence[float], progress: Progress = None
) -> ExactScores:
    """Score candidates at each dose.

    Args:
        scorer: of the examples.
        tables: directions by site.
        candidates: what is scored.
        doses: relative ones.
        progress: as in `Scorer.effects`.
    """
    edits = [c.edit(dose) for c in candidates for dose in (doses[:1] if c.sign == "removed" else doses)]
    values = iter(scorer.effects(tables, edits, progress))
    rows = []
    for candidate in candidates:
        n = 1 if candidate.sign == "removed" else len(doses)
        found = torch.stack([next(values) for _ in range(n)])
        rows.append(found.expand(len(doses), -1))
    return ExactScores(list(candidates), tuple(doses), torch.stack(rows))


def agreement(exact: ExactScores, effects: Mapping[Site, FirstOrder], seed: int) -> tuple[Agreement, ...]:
    """Spearman's correlation of both stages at each dose, with intervals over features."""
    found = []
    for d, dose in enumerate(exact.doses):
        predicted = np.array([c.first_order(effects, dose) for c in exact.candidates])
        ranks = [rankdata(predicted), rankdata(exact.mean[:, d].numpy())]
        interval = bootstrap_statistic(_correlation, ranks, n_resamples=500, seed=seed)
        found.append(Agreement(dose=dose, spearman=interval))
    return tuple(found)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """NaN where either does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else float("nan")
