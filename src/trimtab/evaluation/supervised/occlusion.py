"""Occlusion (Makelov, Lange and Nanda 2024): of two attributes of one head, SAEs find features for the longer codes.

The head is found: where editing IO and editing S by supervised codes both change the answer, the location at which the
lengths of the two differ most. There the values of both that have a feature are counted; and again when the longer
codes are taken out bit by bit, a − α u(prompt), with SAEs trained anew. The control takes out as much of another
value's code, which changes activations no less and leaves the attribute in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.evaluation.circuits.circuit import Circuit
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.codes import Factors, mse_codes
from trimtab.evaluation.supervised.cross_sections import Values
from trimtab.evaluation.supervised.found_values import chosen_f1, fires, n_found
from trimtab.evaluation.supervised.name_codes import NAMES, NameCodes, NameEdits, by_ratio, name_codes
from trimtab.evaluation.supervised.task_saes import TrainingRows, train_saes
from trimtab.lm import LanguageModel
from trimtab.runs import kept_or_temporary
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import Column, Table
from trimtab.stats import Interval
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FOUND = 0.5
"""F1 above which a value has a feature, as in the paper; the feature is chosen on train prompts."""


@dataclass(frozen=True, kw_only=True)
class ValuesFound:
    """Values that have a feature; intervals over trainings and values."""

    l0: float
    n_features: int
    alpha: float
    """Share of the longer codes that was taken out."""
    shuffled: bool
    """Whether it was another value's code (the control)."""
    long: Interval
    """Values of the attribute with the longer codes."""
    short: Interval
    """Values of the other."""
    chance: float
    """Values of the other that have a feature when they are shuffled over prompts."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Occlusion(Result):
    """Where IO and S meet, and which of their values have features there."""

    model: str
    location: str
    both_causal: bool
    """Whether both attributes matter at the location; if not, there is no such location, and it came closest."""
    long: str
    """The attribute with the longer codes, IO or S."""
    short: str
    n_long: int
    """Values of the attribute with the longer codes that the test prompts have."""
    n_short: int
    """The same of the other."""
    prompts: int
    """On which F1 is measured."""
    seeds: tuple[int, ...]
    arch: str
    places: tuple[NameCodes, ...]
    """All locations that were asked, the largest ratio first among those where both matter."""
    confirmed: NameCodes
    """The location once more, on prompts that did not choose it."""
    sparsities: tuple[ValuesFound, ...]
    """At several L0 and sizes, nothing taken out."""
    sweep: tuple[ValuesFound, ...]
    """Over α, with the control."""
    gain: Interval
    """Values of the shorter attribute that have a feature, when all of the longer codes is taken out, less those that
    have one when nothing is."""
    gain_over_control: Interval
    """The same, less those that have one when as much of other values' codes is."""

    def headline(self) -> str:
        """What was found where, with and without the longer codes."""
        first, last = self.sweep[0], [one for one in self.sweep if not one.shuffled][-1]
        control = [one for one in self.sweep if one.shuffled][-1]
        where = f"at {self.location}" + ("" if self.both_causal else " (nowhere do both matter; it came closest)")
        if self.both_causal and not self.confirmed.causal:
            where += " (on test prompts not both matter)"
        ratio = self.confirmed.ratio
        lengths = "" if ratio is None else f", codes of {self.long} {ratio:.1f} times as long"
        return (
            f"{where}{lengths}: {first.long.estimate:.0f} of {self.n_long} values of {self.long} and "
            f"{first.short.estimate:.0f} of {self.n_short} of {self.short} have a feature; without {self.long}'s codes "
            f"{last.short.estimate:.0f} of {self.short} ({self.gain:+.0f}), in the control {control.short.estimate:.0f}"
        )

    def tables(self) -> dict[str, Table]:
        """Values found over sparsities and over α, the locations, and the chosen one on test prompts."""
        found = [Column("L0", "l0", "g"), Column("features", "n_features", "d")]
        counts = [
            Column(f"{self.long} values", "long", ".0f"), Column(f"{self.short} values", "short", ".0f"),
            Column("by chance", "chance", ".1f"),
        ]  # fmt: skip
        swept = [
            Column("α", "alpha", "g"),
            Column("taken out", lambda one: "another value's" if one.shuffled else f"{self.long}'s"),
        ]
        places = [
            Column("location", "location", whole=True), Column("IO length", "io_length", ".2f"),
            Column("S length", "s_length", ".2f"), Column("ratio", "ratio", ".1f"),
            Column("editing IO", "io_effect", "+.2f"), Column("editing S", "s_effect", "+.2f"),
            Column("both matter", lambda one: "yes" if one.causal else "no"),
        ]  # fmt: skip
        return {
            "sweep": Table(columns=[*swept, *counts], rows=self.sweep),
            "sparsities": Table(columns=[*found, *counts], rows=self.sparsities),
            "locations": Table(columns=places, rows=self.places),
            "on test prompts": Table(columns=places, rows=[self.confirmed]),
        }

    def draw(self, ax: Axes) -> None:
        """Values that have a feature over α."""
        curves = [
            Curve(label, [one.alpha for one in points], [getattr(one, which).estimate for one in points])
            for shuffled, which, label in (
                (False, "long", self.long),
                (False, "short", self.short),
                (True, "short", f"{self.short}, control"),
            )
            if (points := [one for one in self.sweep if one.shuffled == shuffled or one.alpha == 0])
        ]
        plot_curves(ax, curves, "values with a feature", steps=f"α: share of {self.long} taken out")


def occlusion(
    model: LanguageModel,
    ioi: IOIDistribution,
    circuit: Circuit,
    train: Sequence[IOIPrompt],
    activations: Values,
    test: Sequence[IOIPrompt],
    test_activations: Values,
    validation: Sequence[IOIPrompt],
    *,
    alphas: Sequence[float] = ALPHAS,
    l0: Sequence[float] = (3.0, 1.0, 8.0),
    n_features: Sequence[int] = (1024, 256),
    arch: str = "topk",
    epochs: int = 100,
    seeds: Sequence[int] = (0, 1),
    run: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Occlusion:
    """Find the location, count values that have a feature, and take the longer codes out.

    Args:
        model: the model.
        ioi: where the prompts are from.
        circuit: which heads; an effect matters from its `share` of the logit difference on.
        train: prompts that codes and SAEs are fitted on.
        activations: theirs, at the locations to choose from.
        test: other prompts, on which features that were chosen on `train` are measured.
        test_activations: theirs.
        validation: further prompts, by which the location is chosen; as many of `test` then show its effects again.
        alphas: shares of the longer codes to take out, from 0 to 1.
        l0: active features per row; the sweep has the first.
        n_features: sizes of SAEs; the sweep has the first.
        arch: their architecture.
        epochs: passes over `train`.
        seeds: of SAEs.
        run: directory to keep the SAEs in; by default nothing is kept.
        progress: called with the number of locations done, of as many as `activations` has.

    Raises:
        UserError: no location, α that leave out 0 or 1, or as `train_saes` does.
    """
    if not {0.0, 1.0} <= set(alphas) or not all(0 <= alpha <= 1 for alpha in alphas):
        raise UserError(
            f"alphas {', '.join(f'{a:g}' for a in alphas)}", "they go from 0 to 1", "name both, and between"
        )
    if not activations or not seeds:
        raise UserError("seeds" if activations else "locations", "there is none", "give at least one")
    edits = NameEdits.of(model, ioi, validation, tuple(activations), seeds[0])
    places: dict[Location, NameCodes] = {}
    for location, x in activations.items():
        places[location] = name_codes(edits, location, train, x, circuit.share)
        if progress is not None:
            progress(1)
    ordered = sorted(places, key=lambda location: by_ratio(places[location]), reverse=True)
    chosen, x = ordered[0], activations[ordered[0]]
    long, short = NAMES if places[chosen].io_length >= places[chosen].s_length else NAMES[::-1]
    again = NameEdits.of(model, ioi, test[: len(validation)], [chosen], seeds[0])

    own = Taken.of(train, test, x, test_activations[chosen], long, seeds[0])
    about = {"model": model.name, "model_fingerprint": model.fingerprint, "site": str(chosen.site)}
    taken = {f"alpha{a:g}": own.rows(a, False, about) for a in sorted(alphas)}
    taken |= {f"shuffled{a:g}": own.rows(a, True, about) for a in sorted(alphas) if a}
    values = {attribute: _numbers(train, test, attribute) for attribute in NAMES}
    generator = torch.Generator().manual_seed(seeds[0])
    by_chance = tuple(of[torch.randperm(len(of), generator=generator)] for of in values[short])
    f1: dict[tuple[str, float, int], list[dict[str, Tensor]]] = {}
    with kept_or_temporary(run) as path:
        for name, rows, sparsities, sizes in (
            ("sparsities", {"alpha0": taken["alpha0"]}, l0, n_features),
            ("sweep", {name: rows for name, rows in taken.items() if name != "alpha0"}, l0[:1], n_features[:1]),
        ):
            for sparsity in sparsities:
                for size in sizes:
                    saes = train_saes(
                        rows, path / name, arch=(arch,), l0=(sparsity,), n_features=(size,), epochs=epochs, seed=seeds
                    )
                    for of_seed in saes.values():
                        for which, sae in of_seed.items():
                            fired, fired_test = fires(sae, rows[which].train), fires(sae, rows[which].heldout)
                            scores = {
                                name: chosen_f1(fired, own, fired_test, other)
                                for name, (own, other) in {**values, "chance": by_chance}.items()
                            }
                            f1.setdefault((which, sparsity, size), []).append(scores)

    def found(which: str, sparsity: float, size: int, attribute: str) -> list[Bool[Tensor, " V"]]:
        return [scores[attribute] > FOUND for scores in f1[which, sparsity, size]]

    def counted(which: str, sparsity: float, size: int) -> ValuesFound:
        return ValuesFound(
            l0=sparsity, n_features=size,
            alpha=float(re.sub("[a-z]", "", which)), shuffled=which.startswith("shuffled"),
            long=n_found(found(which, sparsity, size, long)), short=n_found(found(which, sparsity, size, short)),
            chance=n_found(found(which, sparsity, size, "chance")).estimate,
        )  # fmt: skip

    def difference(a: str, b: str) -> Interval:
        pairs = zip(found(a, l0[0], n_features[0], short), found(b, l0[0], n_features[0], short), strict=True)
        return n_found([one.double() - other.double() for one, other in pairs])

    return Occlusion(
        model=model.name, location=str(chosen), both_causal=places[chosen].causal, long=long, short=short,
        n_long=len(values[long][1].unique()), n_short=len(values[short][1].unique()), prompts=len(test),
        seeds=tuple(seeds), arch=arch,
        places=tuple(places[location] for location in ordered),
        confirmed=name_codes(again, chosen, train, x, circuit.share),
        sparsities=tuple(counted("alpha0", s, n) for n in n_features for s in l0),
        sweep=tuple(counted(which, l0[0], n_features[0]) for which in taken),
        gain=difference("alpha1", "alpha0"), gain_over_control=difference("alpha1", "shuffled1"),
    )  # fmt: skip


def _numbers(
    train: Sequence[IOIPrompt], test: Sequence[IOIPrompt], attribute: str
) -> tuple[Int[Tensor, " P"], Int[Tensor, " Q"]]:
    """An attribute's values on both, by one numbering."""
    names = [[prompt.attributes[attribute] for prompt in prompts] for prompts in (train, test)]
    number = {name: i for i, name in enumerate(sorted({*names[0], *names[1]}))}
    found = [torch.tensor([number[name] for name in of]) for of in names]
    return found[0], found[1]


class Taken(NamedTuple):
    """Activations, and the codes of one attribute that can be taken out of them."""

    x: tuple[Tensor, Tensor]  # of train and test prompts
    codes: tuple[Tensor, Tensor]  # of each prompt's value
    shuffled: tuple[Tensor, Tensor]  # of another value, the same one for all prompts of a value

    @classmethod
    def of(
        cls,
        train: Sequence[IOIPrompt],
        test: Sequence[IOIPrompt],
        x: Float[Tensor, "P width"],
        x_test: Float[Tensor, "Q width"],
        attribute: str,
        seed: int,
    ) -> Taken:
        """Fit codes on train prompts."""
        factors = Factors.of(train)
        rows = factors.rows(train), factors.rows(test)
        vectors = mse_codes(x, factors, rows[0]).vectors
        at = factors.factors.index((attribute,))
        start, n = sum(map(len, factors.values[:at])), len(factors.values[at])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        other = torch.empty_like(order)
        other[order] = order.roll(1)  # one cycle, so that no value keeps its own
        both = [(vectors[r[:, at]], vectors[start + other[r[:, at] - start]]) for r in rows]
        return cls((x, x_test), (both[0][0], both[1][0]), (both[0][1], both[1][1]))

    def rows(self, alpha: float, shuffled: bool, about: Mapping[str, str]) -> TrainingRows:
        """What is left when a share of the codes is taken out."""
        codes = self.shuffled if shuffled else self.codes
        train, test = (x - alpha * u for x, u in zip(self.x, codes, strict=True))
        return TrainingRows(train, test, about)
