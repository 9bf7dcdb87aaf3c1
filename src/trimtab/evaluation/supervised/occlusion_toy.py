"""Why sparse autoencoders miss an attribute: a toy in which one of two has larger vectors (Makelov et al. 2024).

a = u_i + v_j with 216 values of i and of j, all u and v Gaussian in R^64, those of u longer. Few features may be
active, so that the loss is lowest where they tell the long vectors apart, and the short ones go without: they are
*occluded*. With equal norms both are found alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trimtab.errors import UserError
from trimtab.evaluation.supervised.found_values import chosen_f1, fires
from trimtab.evaluation.supervised.task_saes import TrainingRows, train_saes
from trimtab.runs import kept_or_temporary
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import Column, Table
from trimtab.stats import Interval, student_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATIOS = (1.0, 1.5, 2.0, 4.0)
THRESHOLDS = (0.9, 0.5, 0.3)
BATCH, LR = 256, 3e-3
"""Many small steps: at the usual 1,024 rows and 1e-3 it takes more passes to get as far."""
APART = 1_000_000
"""Between the seeds of an SAE's initial weights and of vectors, which would be the same draws with one seed."""


@dataclass(frozen=True, kw_only=True)
class ToyFound:
    """Values that have a feature, at one ratio of norms, L0 and threshold; intervals over seeds."""

    ratio: float
    """Mean norm of u over that of v."""
    l0: float
    threshold: float
    """Least F1 of a value's feature: chosen on rows that it was trained on, measured on others."""
    high: Interval
    """Values of the attribute with the longer vectors."""
    low: Interval
    """Values of the other."""


@dataclass(frozen=True, kw_only=True, repr=False)
class OcclusionToy(Result):
    """Values found, over ratios of norms, sparsities and thresholds."""

    n_values: int
    """Of each attribute."""
    n_features: int
    arch: str
    seeds: tuple[int, ...]
    """Each of its own vectors and its own initial weights."""
    found: tuple[ToyFound, ...]

    def at(self, ratio: float, l0: float, threshold: float) -> ToyFound:
        """What was found there."""
        wanted = (ratio, l0, threshold)
        return next(one for one in self.found if (one.ratio, one.l0, one.threshold) == wanted)

    def headline(self) -> str:
        """What was found at the first L0, over ratios, at the largest and the smallest threshold."""
        l0, thresholds = self.found[0].l0, _unlike(self.found, "threshold")
        ends = list(dict.fromkeys((max(thresholds), min(thresholds))))
        said = [
            f"norms {ratio:g} to 1: "
            + ", ".join(f"{one.high.estimate:.0f} and {one.low.estimate:.0f}" for one in found)
            for ratio in _unlike(self.found, "ratio")
            if (found := [self.at(ratio, l0, threshold) for threshold in ends])
        ]
        at = " and ".join(f"{threshold:g}" for threshold in ends)
        return (
            f"values of the high-norm and of the low-norm attribute ({self.n_values} each) that have a feature with an "
            f"F1 from {at}, L0 {l0:g}: {'; '.join(said)}"
        )

    def tables(self) -> dict[str, Table]:
        """A row per ratio, L0 and threshold."""
        columns = [
            Column("norms", "ratio", "g"), Column("L0", "l0", "g"), Column("F1 from", "threshold", "g"),
            Column("high-norm values", "high", ".0f"), Column("low-norm values", "low", ".0f"),
        ]  # fmt: skip
        return {"found": Table(columns=columns, rows=self.found)}

    def draw(self, ax: Axes) -> None:
        """Values found over the ratio, of both attributes, at the first L0."""
        l0, ratios = self.found[0].l0, _unlike(self.found, "ratio")
        curves = [
            Curve(
                f"{which}-norm, F1 ≥ {threshold:g}",
                ratios,
                [getattr(self.at(r, l0, threshold), which).estimate for r in ratios],
            )
            for threshold in _unlike(self.found, "threshold")
            for which in ("high", "low")
        ]
        plot_curves(ax, curves, f"values of {self.n_values} with a feature", steps=f"ratio of norms, at L0 {l0:g}")


def _unlike(found: Sequence[ToyFound], name: str) -> list[float]:
    return list(dict.fromkeys(getattr(one, name) for one in found))


def occlusion_toy(
    ratios: Sequence[float] = RATIOS,
    *,
    l0: Sequence[float] = (2.0, 4.0),
    thresholds: Sequence[float] = THRESHOLDS,
    n_values: int = 216,
    d: int = 64,
    n_features: int = 512,
    arch: str = "topk",
    epochs: int = 13,
    heldout: int = 8000,
    seeds: Sequence[int] = (0, 1, 2),
    run: Path | None = None,
) -> OcclusionToy:
    """Train SAEs on the toy and count the values that have a feature.

    Args:
        ratios: mean norm of u over that of v; 1 is the control.
        l0: active features per row; two are enough to say i and j.
        thresholds: F1 from which on a feature is of a value.
        n_values: of i, and of j; rows are all pairs.
        d: width.
        n_features: of an SAE; twice `n_values` are enough.
        arch: its architecture.
        epochs: passes over the rows that are not held out: about 2,000 steps.
        heldout: rows on which F1 is measured.
        seeds: of vectors, rows held out and initial weights.
        run: directory to keep the SAEs in; by default nothing is kept.

    Raises:
        UserError: as many rows held out as there are, a ratio that is not positive, none of something, or as
            `train_saes` does.
    """
    if not 0 < heldout < n_values**2:
        raise UserError(f"{heldout} rows held out", f"there are {n_values**2}", "hold out some of them")
    if any(ratio <= 0 for ratio in ratios):
        raise UserError(f"ratio {min(ratios):g}", "norms are positive", "give positive ratios")
    if empty := next((n for n, v in {"ratios": ratios, "thresholds": thresholds, "seeds": seeds}.items() if not v), ""):
        raise UserError(empty, "there is none", "give at least one")
    scores: dict[tuple[float, float, int], list[torch.Tensor]] = {}
    with kept_or_temporary(run) as path:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed + APART)
            u, v = torch.randn(2, n_values, d, generator=generator) / d**0.5
            pairs = torch.cartesian_prod(torch.arange(n_values), torch.arange(n_values))
            pairs = pairs[torch.randperm(len(pairs), generator=generator)]
            test, train = pairs[:heldout], pairs[heldout:]
            rows = {
                f"ratio{r:g}": TrainingRows(r * u[train[:, 0]] + v[train[:, 1]], r * u[test[:, 0]] + v[test[:, 1]])
                for r in ratios
            }
            bank = path / f"seed{seed}"
            for sparsity in l0:
                found = train_saes(
                    rows,
                    bank,
                    arch=(arch,),
                    l0=(sparsity,),
                    n_features=(n_features,),
                    epochs=epochs,
                    batch_size=BATCH,
                    lr=LR,
                    seed=(seed,),
                )
                (saes,) = found.values()
                for ratio in ratios:
                    sae, of = saes[f"ratio{ratio:g}"], rows[f"ratio{ratio:g}"]
                    fired, fired_test = fires(sae, of.train), fires(sae, of.heldout)
                    scores[ratio, sparsity, seed] = [
                        chosen_f1(fired, values, fired_test, test_values)
                        for values, test_values in zip(train.T, test.T, strict=True)
                    ]

    def counted(ratio: float, sparsity: float, threshold: float, attribute: int) -> Interval:
        found = student_mean([int((scores[ratio, sparsity, s][attribute] >= threshold).sum()) for s in seeds])
        return (
            replace(found, low=max(found.low, 0.0), high=min(found.high, float(n_values))) if len(seeds) > 1 else found
        )

    return OcclusionToy(
        n_values=n_values, n_features=n_features, arch=arch, seeds=tuple(seeds),
        found=tuple(
            ToyFound(ratio=r, l0=s, threshold=t, high=counted(r, s, t, 0), low=counted(r, s, t, 1))
            for s in l0
            for r in ratios
            for t in thresholds
        ),
    )  # fmt: skip
