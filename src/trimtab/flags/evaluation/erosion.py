"""Erosion: whether the rest of the residual stream still says what the flags say, over a finetuning.

At each moment and layer probes of each concept read all dimensions, all but the flags', the flags' alone, and all but
as many others of like variance. A fall of the second below what it was, and below what a plain finetuning of equal
steps leaves, is erosion; the last one says what taking away so many dimensions does by itself. What probes find by
chance is shown by the same ones fitted on shuffled labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from trimtab.errors import UserError
from trimtab.flags.evaluation.harvest import PLACES, Harvest
from trimtab.flags.evaluation.measured import CHANGES, MOMENT, Measured, MomentRow, Part, Series, compared, curves
from trimtab.flags.evaluation.probes import PROBES, fit_probes
from trimtab.flags.evaluation.reading import mean_auc
from trimtab.flags.evaluation.texts import LabelledTexts
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.runs.figures import plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import INTERVAL, SIGNED, Column, Table
from trimtab.stats import Interval, Resampled, Resamples, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WHOLE, WITHOUT, ONLY, RANDOM = "all", "without flags", "flags only", "without others"
SHUFFLED = "without flags, labels shuffled"
MEAN = -1
"""Stands for the mean over layers with flags, in keys."""
PROBED = 5
"""Layers that probes read unless told otherwise."""
Key = tuple[int, str, str, str]
"""Layer, place, kind of probe, dimensions."""


def probed_layers(model: LanguageModel, first: int, given: Sequence[int] = ()) -> tuple[int, ...]:
    """Layers that probes read: those given, or five, evenly spaced over those with flags.

    Args:
        model: the model.
        first: the first layer with flags.
        given: layers, if any.

    Raises:
        UserError: the model has no such layer, one is given twice, or none of them has flags.
    """
    for i, layer in enumerate(given):
        check_layer(model, layer)
        if layer in given[:i]:
            raise UserError(f"layer {layer}", "it is named twice", "name it once")
    if given and max(given) < first:
        raise UserError(f"layer {max(given)}", f"flags begin at layer {first}", "name one from there on, too")
    usual = np.linspace(first, model.n_layers - 1, PROBED).round().astype(int).tolist()
    return tuple(sorted(given) or dict.fromkeys(usual))


def check_layer(model: LanguageModel, layer: int) -> int:
    """A layer of the model. Raises a `UserError` if it has no such one."""
    if not 0 <= layer < model.n_layers:
        raise UserError(f"layer {layer}", f"{model.name} has layers 0 to {model.n_layers - 1}", "choose one of them")
    return layer


Probed = tuple[str, int, list[int], Bool[np.ndarray, "n C"]]
"""What probes are fitted on: name, number of the draw of a control, dimensions that are read, labels."""


def probed(flags: FlagSpec, draws: Sequence[FlagSpec], labels: Bool[np.ndarray, "n C"], seed: int) -> list[Probed]:
    """Everything that probes are fitted on at one layer and place."""

    def without(spec: FlagSpec) -> list[int]:
        return np.setdiff1d(range(flags.d_model), spec.flat_dims).tolist()

    rng = np.random.default_rng(seed)
    return [
        (WHOLE, 0, list(range(flags.d_model)), labels),
        (WITHOUT, 0, without(flags), labels),
        (ONLY, 0, sorted(flags.flat_dims), labels),
        *((RANDOM, i, without(draw), labels) for i, draw in enumerate(draws)),
        *((SHUFFLED, i, without(flags), rng.permutation(labels)) for i in range(len(draws))),
    ]


def probe_values(
    sets: Sequence[Probed],
    fitted: Harvest,
    reported: Harvest,
    layers: Sequence[int],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Scores `[N, C]`, flat, of every probe on the examples that are reported.

    Args:
        sets: dimensions and labels that probes are fitted on.
        fitted: activations that they are fitted on.
        reported: activations that they score.
        layers: after which they read.
        seed: of networks.
        progress: told of the sets done.
    """
    found: list[Measured] = []
    for layer in layers:
        for at, place in enumerate(PLACES):
            for dims, draw, columns, labels in sets:
                train, test = (each.residual[layer][at][:, columns].numpy() for each in (fitted, reported))
                for probe, scores in fit_probes(train, labels, test, seed).items():
                    key = {"layer": layer, "place": place, "dims": dims, "draw": draw, "probe": probe}
                    found.append(Measured(key, scores.flatten()))
                if progress:
                    progress(1)
    return found


@dataclass(frozen=True, kw_only=True)
class ProbeAUC(MomentRow):
    """AUC of one kind of probe, mean over concepts."""

    layer: int
    """After which; −1 for the mean over layers with flags."""
    place: str
    """`prompt`: at the last prompt token; `response`: of the mean over the response's tokens."""
    probe: str
    dims: str
    """What it reads: `all`, `without flags`, `flags only`, `without others`, which are no flag's and drawn several
    times; or `without flags, labels shuffled`, where it was fitted on labels that were exchanged, several times."""
    auc: Interval
    selectivity: Interval | None
    """Above that of the probes fitted on shuffled labels; of `without flags` alone."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Erosion(Result):
    """What probes read, over finetunings; 95% intervals over reported examples."""

    first_layer: int
    """Where flags begin: means over layers begin there."""
    probes: tuple[ProbeAUC, ...]

    def over_layers(self, place: str, probe: str, dims: str) -> list[ProbeAUC]:
        """Means over layers with flags, moment by moment, run by run."""
        return [
            row for row in self.probes
            if (row.layer, row.place, row.probe, row.dims) == (MEAN, place, probe, dims)
        ]  # fmt: skip

    def headline(self) -> str:
        last = {row.moment.run: row for row in self.over_layers("response", "linear", WITHOUT)}
        said = [
            f"{run} {number_text(row.change, SIGNED)}"
            + (f" ({number_text(row.beyond_plain, SIGNED)} beyond plain)" if row.beyond_plain else "")
            for run, row in last.items()
        ]
        about = "change since step 0 of the AUC of linear probes of responses without the flags' dimensions"
        return f"{about}, mean over layers from {self.first_layer} on: {'; '.join(said)}"

    def tables(self) -> dict[str, Table]:
        last = {row.moment.run: row.moment.step for row in self.probes}
        scores = [
            Column("AUC", "auc", INTERVAL), *CHANGES, Column("above shuffled", "selectivity", SIGNED, spare=2),
        ]  # fmt: skip
        which = [Column("place", "place"), Column("probe", "probe"), Column("dimensions", "dims", whole=True)]
        caption = (
            f"Mean over concepts, and over probed layers from {self.first_layer} on, where flags begin; 0.5 is chance. "
            "Others: as many dimensions of like variance that are no flag's. Intervals (95%) are over reported "
            "examples and over draws of dimensions and labels."
        )
        means = [row for row in self.probes if row.layer == MEAN]
        layers = [row for row in self.probes if row.layer != MEAN and row.moment.step in (0, last[row.moment.run])]
        columns = [*MOMENT, *which, *scores]
        return {
            "erosion": Table(
                columns=columns, rows=[row for row in means if row.moment.step == last[row.moment.run]], caption=caption
            ),
            "over steps": Table(columns=columns, rows=means),
            "by layer": Table(columns=[*MOMENT, Column("layer", "layer", "d"), *which, *scores], rows=layers),
        }  # fmt: skip

    def draw(self, ax: Axes, place: str = "response", probe: str = "linear", run: str = "") -> None:
        """AUC over steps without the flags' dimensions, a curve for each run; of one run, for all sets."""
        sets = [WHOLE, WITHOUT, ONLY, RANDOM, SHUFFLED] if run else [WITHOUT]
        rows = [row for dims in sets for row in self.over_layers(place, probe, dims) if run in ("", row.moment.run)]
        plot_curves(ax, curves(rows, "auc", "{dims}" if run else "{moment.run}"), "AUC", steps="step")

    @property
    def figures(self) -> dict[str, Callable[[Axes], None]]:
        """Drawings by their captions."""
        about = {"response": "mean over the response's tokens", "prompt": "last prompt token"}
        found: dict[str, Callable[[Axes], None]] = {
            f"{probe} probes without the flags' dimensions, {where}": partial(self.draw, place=place, probe=probe)
            for place, where in about.items()
            for probe in PROBES
        }
        runs = dict.fromkeys(row.moment.run for row in self.probes)
        return found | {
            f"{run}: linear probes of all dimensions and of parts, {about['response']}": partial(self.draw, run=run)
            for run in runs
        }


def erosion_result(series: Sequence[Series], texts: LabelledTexts, resamples: Resamples, first_layer: int) -> Erosion:
    """Intervals of what `probe_values` measured.

    Args:
        series: of each run.
        texts: the examples reported.
        resamples: of them.
        first_layer: the first with flags of all runs.
    """

    def aucs(part: Part) -> dict[Key, Resampled]:
        draws: dict[Key, list[Resampled]] = {}
        for row in part.rows:
            layer, place, probe, dims = (row.key[name] for name in ("layer", "place", "probe", "dims"))
            value = mean_auc(row.values.reshape(texts.labels.shape), texts.labels, resamples)
            draws.setdefault((int(layer), str(place), str(probe), str(dims)), []).append(value)
        known = {key: resamples.mean_of_draws(of) for key, of in draws.items()}
        for rest in dict.fromkeys(key[1:] for key in draws):
            layers = [value for key, value in known.items() if key[1:] == rest and key[0] >= first_layer]
            known[MEAN, *rest] = Resampled.mean(layers)
        return known

    found: list[ProbeAUC] = []
    rows = list(compared(series, aucs))
    chance = {(row.moment, *row.key[:3]): row.value for row in rows if row.key[3] == SHUFFLED}
    for row in rows:
        layer, place, probe, dims = row.key
        above = row.value - chance[row.moment, layer, place, probe] if dims == WITHOUT else None
        found.append(
            ProbeAUC(
                **row.fields, layer=layer, place=place, probe=probe, dims=dims, auc=row.value.interval,
                selectivity=above.interval if above else None,
            )
        )  # fmt: skip
    return Erosion(first_layer=first_layer, probes=tuple(found))
