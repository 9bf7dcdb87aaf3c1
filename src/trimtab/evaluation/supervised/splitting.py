"""Over-splitting (Makelov, Lange and Nanda 2024): how many features an SAE makes of one binary attribute, Pos.

A feature is *of a value* if it fires on that value's prompts nearly alone. Such features are counted, grouped by the
directions that they write, and asked how much they overlap, against features that fire as often on the same prompts
independently of one another; how well the best few of them say the value together; and whether another SAE, which
differs in its seed alone, has the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.evaluation.supervised.cross_sections import Values
from trimtab.evaluation.supervised.found_values import fires
from trimtab.evaluation.supervised.task_saes import train_task_saes
from trimtab.evaluation.supervised.value_features import (
    chance_overlap,
    clusters,
    of_value,
    overlap,
    recurrence,
    union_order,
)
from trimtab.lm import LanguageModel
from trimtab.runs import kept_or_temporary
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import Cell, Column, Table
from trimtab.stats import Interval, bootstrap_mean, bootstrap_statistic, student_mean
from trimtab.tasks.ioi_prompts import IOIPrompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POS = ("ABB", "BAB")
SIZES = (1, 2, 4, 8, 16, 32)
RESAMPLES = 300


@dataclass(frozen=True, kw_only=True)
class SplitPos:
    """Features of Pos at one location; numbers of features are means over both values and all seeds."""

    location: str
    features: Interval
    """Of one value; interval over seeds."""
    by_chance: float
    """When Pos is shuffled over prompts."""
    clusters: Interval
    """Groups of them that write similar directions; interval over seeds."""
    active: float | None
    """Of a value's features those that fire on one of its prompts. This and what follows is on test prompts; None where
    no SAE has two features of a value."""
    overlap: float | None
    """Mean over pairs of features of one value."""
    chance: float | None
    """The same of features that fire as often on the value's prompts, each by itself."""
    difference: Interval | None
    """overlap − chance; interval over prompts."""
    cosine: Interval | None
    """Largest cosine with a decoder row of the SAE of another seed, mean over these SAEs and over features. This and
    what follows has its interval over features, as if those of one SAE were independent, which they are not: read it as
    the least uncertainty. None with one seed."""
    random_cosine: float | None
    """With as many random rows of the same covariance."""
    recurring: Interval | None
    """Overlap with that feature."""
    exchanged: float | None
    """Overlap with that feature of another feature of the value."""
    recurring_difference: Interval | None
    """recurring − exchanged."""


@dataclass(frozen=True, kw_only=True)
class UnionScore:
    """How well the best k features say a value of Pos together: chosen on train prompts, scored on test prompts."""

    location: str
    k: int
    f1: Interval
    """Of the union of their firing, mean over both values and all seeds; interval over prompts."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Splitting(Result):
    """Features of Pos at every location."""

    model: str
    setting: str
    """Architecture, size and L0 of the SAEs."""
    seeds: tuple[int, ...]
    prompts: int
    locations: tuple[SplitPos, ...]
    """The most split first."""
    unions: tuple[UnionScore, ...]

    def headline(self) -> str:
        """The location at which Pos is split most."""
        most = self.locations[0]
        unions = [one for one in self.unions if one.location == most.location]
        said = f"{most.features.estimate:.0f} features of a value of Pos at {most.location}"
        if most.overlap is not None and most.chance is not None:
            said += f", which overlap by {most.overlap:.3f} (by chance {most.chance:.3f})"
        said += f"; the best one has an F1 of {unions[0].f1.estimate:.2f}, the best {unions[-1].k} together "
        return f"{said}{unions[-1].f1.estimate:.2f}"

    def tables(self) -> dict[str, Table]:
        """Features by location, how they recur, and unions."""
        place = Column("location", "location", whole=True)
        split = [
            place, Column("of a value", "features", ".1f"), Column("by chance", "by_chance", ".1f"),
            Column("clusters", "clusters", ".1f"), Column("active", "active", ".2f"),
            Column("overlap", "overlap", ".3f"), Column("independent", "chance", ".3f"),
            Column("difference", "difference", "+.3f"),
        ]  # fmt: skip
        recurring = [
            place, Column("cosine", "cosine", ".2f"), Column("random rows", "random_cosine", ".2f"),
            Column("overlap", "recurring", ".2f"), Column("exchanged", "exchanged", ".2f"),
            Column("difference", "recurring_difference", "+.2f"),
        ]  # fmt: skip
        ks = list(dict.fromkeys(one.k for one in self.unions))
        unions = [place, *(Column(f"{k} features" if k > 1 else "1 feature", f"f1_of_{k}", ".2f") for k in ks)]
        rows: dict[str, dict[str, Cell]] = {one.location: {"location": one.location} for one in self.locations}
        for one in self.unions:
            rows[one.location][f"f1_of_{one.k}"] = one.f1
        return {
            "features of Pos": Table(columns=split, rows=self.locations),
            "over seeds": Table(columns=recurring, rows=self.locations),
            "F1 of unions": Table(columns=unions, rows=list(rows.values())),
        }

    def draw(self, ax: Axes) -> None:
        """F1 of unions over their size, at the most split locations."""
        curves = [
            Curve(place.location, [one.k for one in own], [one.f1.estimate for one in own])
            for place in self.locations[:6]
            if (own := [one for one in self.unions if one.location == place.location])
        ]
        plot_curves(ax, curves, "F1 for Pos of their union", steps="features")


class _Trained(NamedTuple):
    """One SAE on train and test prompts."""

    rows: Tensor  # [n, width]
    train: Tensor  # [P, n] firing
    test: Tensor  # [Q, n]
    own: Mapping[str, Tensor]  # per value of Pos the numbers of its features

    @classmethod
    def of(cls, sae: Dictionary, train: Tensor, test: Tensor, has: Mapping[str, Tensor]) -> _Trained:
        fired = fires(sae, train)
        own = {value: of_value(fired, prompts).nonzero().flatten() for value, prompts in has.items()}
        return cls(sae.W_dec.detach().float(), fired, fires(sae, test), own)


def splitting(
    model: LanguageModel,
    train: Sequence[IOIPrompt],
    activations: Values,
    test: Sequence[IOIPrompt],
    test_activations: Values,
    *,
    arch: str = "topk",
    l0: float = 3.0,
    n_features: int = 1024,
    epochs: int = 100,
    seeds: Sequence[int] = (0, 1),
    ks: Sequence[int] = SIZES,
    run: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Splitting:
    """Train SAEs at every location, and look at their features of Pos.

    Args:
        model: the model.
        train: prompts that SAEs are trained on, and by which features are chosen.
        activations: theirs, at the locations to look at.
        test: other prompts, on which all else is measured.
        test_activations: theirs.
        arch: architecture.
        l0: active features per row. Few active features overlap little by that alone.
        n_features: size.
        epochs: passes over `train`.
        seeds: of SAEs; with one, nothing is said about recurrence.
        ks: features of a union.
        run: directory to keep the SAEs in; by default nothing is kept.
        progress: called with the number of locations done, once all SAEs are trained.

    Raises:
        UserError: no location, no seed, k below 1, prompts of one value of Pos, or as `train_saes` does.
    """
    if not activations or not seeds or not ks:
        raise UserError("locations" if not activations else "ks" if seeds else "seeds", "there is none", "give one")
    if min(ks) < 1:
        raise UserError(f"k = {min(ks)}", "a union has at least one feature", "raise it")
    truth = {split: _values(prompts, split) for split, prompts in (("train", train), ("test", test))}
    with kept_or_temporary(run) as path:
        found = train_task_saes(
            model, activations, {place: test_activations[place] for place in activations}, path,
            arch=(arch,), l0=(l0,), n_features=(n_features,), epochs=epochs, seed=seeds,
        )  # fmt: skip
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seeds[0]))
    split: list[SplitPos] = []
    unions: list[UnionScore] = []
    for place, x in activations.items():
        saes = [_Trained.of(of_seed[place], x, test_activations[place], truth["train"]) for of_seed in found.values()]
        shuffled = [of_value(sae.train, has[order]).sum() for sae in saes for has in truth["train"].values()]
        split.append(
            SplitPos(
                location=str(place),
                features=_count([sum(map(len, sae.own.values())) / len(POS) for sae in saes]),
                by_chance=float(torch.stack(shuffled).double().mean()),
                clusters=_count([sum(_n_clusters(sae, value) for value in POS) / len(POS) for sae in saes]),
                **_overlaps(saes, truth["test"]),
                **_recurring(saes, seeds[0]),
            )
        )
        unions += _unions(str(place), saes, truth, ks)
        if progress is not None:
            progress(1)
    split.sort(key=lambda one: -one.features.estimate)
    setting = f"{arch}, {n_features:,} features, L0 {l0:g}"
    return Splitting(
        model=model.name, setting=setting, seeds=tuple(seeds), prompts=len(test), locations=tuple(split),
        unions=tuple(unions),
    )  # fmt: skip


def _values(prompts: Sequence[IOIPrompt], split: str) -> dict[str, Bool[Tensor, " P"]]:
    found = {value: torch.tensor([prompt.attributes["Pos"] == value for prompt in prompts]) for value in POS}
    if lacking := next((value for value, has in found.items() if not has.any()), None):
        raise UserError(f"{split} prompts", f"none is {lacking}", "draw prompts of both patterns")
    return found


def _count(numbers: Sequence[float]) -> Interval:
    """Mean over seeds; a number of features is never below 0."""
    mean = student_mean(numbers)
    return replace(mean, low=max(mean.low, 0.0)) if len(numbers) > 1 else mean


def _n_clusters(sae: _Trained, value: str) -> int:
    return len(clusters(sae.rows[sae.own[value]]).unique())


def _overlaps(saes: Sequence[_Trained], has: Mapping[str, Bool[Tensor, " Q"]]) -> dict[str, Any]:
    """How features of one value fire together on its test prompts."""
    groups = [
        (sae.test[:, sae.own[value]].numpy(), prompts.numpy())
        for sae in saes
        for value, prompts in has.items()
        if len(sae.own[value]) > 1
    ]
    if not groups:
        return dict.fromkeys(("active", "overlap", "chance", "difference"))

    def pairs(index: Any) -> tuple[float, float]:
        """Mean over pairs, mean over groups: of overlaps, and of what they are by chance."""
        means: list[tuple[float, float]] = []
        for fired, prompts in groups:
            own = torch.from_numpy(fired[index[prompts[index]]])
            upper = torch.ones(own.shape[1], own.shape[1], dtype=torch.bool).triu(1)
            rates = own.double().mean(0)
            means.append((float(overlap(own, own)[upper].mean()), float(chance_overlap(rates, rates)[upper].mean())))
        return tuple(np.mean(means, 0))

    every = np.arange(len(next(iter(has.values()))))
    mean, chance = pairs(every)
    return {
        "active": float(np.mean([fired[prompts].sum(1).mean() for fired, prompts in groups])),
        "overlap": mean,
        "chance": chance,
        "difference": bootstrap_statistic(lambda i: float(np.subtract(*pairs(i))), [every], n_resamples=RESAMPLES),
    }


def _recurring(saes: Sequence[_Trained], seed: int) -> dict[str, Any]:
    """Features of each SAE beside those of the others, each feature once: averaged over the others."""
    found: list[list[Tensor]] = []
    for one in saes:
        others = [(other, alive) for other in saes if other is not one and (alive := other.train.any(0)).any()]
        for own in one.own.values():
            if len(own) > 1 and others:
                beside = [
                    recurrence(one.rows[own], other.rows[alive], one.test[:, own], other.test[:, alive], seed)
                    for other, alive in others
                ]
                found.append([torch.stack(parts).double().mean(0) for parts in zip(*beside, strict=True)])
    if not found:
        return dict.fromkeys(("cosine", "random_cosine", "recurring", "exchanged", "recurring_difference"))
    cosine, random, own, exchanged = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return {
        "cosine": bootstrap_mean(cosine), "random_cosine": float(random.mean()), "recurring": bootstrap_mean(own),
        "exchanged": float(exchanged.mean()), "recurring_difference": bootstrap_mean(own - exchanged),
    }  # fmt: skip


def _unions(
    location: str, saes: Sequence[_Trained], truth: Mapping[str, Mapping[str, Tensor]], ks: Sequence[int]
) -> list[UnionScore]:
    pairs = [(sae, value) for sae in saes for value in POS]
    orders = [union_order(sae.train, truth["train"][value], max(ks)) for sae, value in pairs]
    has = np.stack([truth["test"][value].numpy() for _, value in pairs], 1)

    def f1(said: Any, true: Any) -> float:
        return float(np.mean(2 * (said & true).sum(0) / np.maximum(said.sum(0) + true.sum(0), 1)))

    scores: list[UnionScore] = []
    for k in sorted(ks):
        said = [sae.test[:, order[:k]].any(1).numpy() for (sae, _), order in zip(pairs, orders, strict=True)]
        scores.append(
            UnionScore(
                location=location, k=k, f1=bootstrap_statistic(f1, [np.stack(said, 1), has], n_resamples=RESAMPLES)
            )
        )
    return scores
