"""Erosion: whether the rest of the residual stream still says what the flags say, over a finetuning.

At each moment and layer probes of each concept read all dimensions, all but the flags', the flags' alone, and all but
as many random ones. A fall of the second below what it was, and below what a plain finetuning of equal steps leaves, is
erosion; the last one says what taking away so many dimensions does by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trimtab.flags.evaluation.harvest import PLACES, Harvest
from trimtab.flags.evaluation.measured import MOMENT, Measured, Moment, Series, plain_parts
from trimtab.flags.evaluation.probes import PROBES, fit_probes
from trimtab.flags.evaluation.reading import mean_auc
from trimtab.flags.evaluation.texts import LabelledTexts
from trimtab.flags.spec import FlagSpec
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import INTERVAL, SIGNED, Column, Table
from trimtab.stats import Interval, Resampled, Resamples, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WHOLE, WITHOUT, ONLY, RANDOM = "all", "without flags", "flags only", "without random"
MEAN = -1
"""Stands for the mean over layers, in keys."""


def subsets(flags: FlagSpec, unassigned: FlagSpec) -> dict[str, list[int]]:
    """Dimensions that probes read."""
    every = range(flags.d_model)
    taken, others = set(flags.flat_dims), set(unassigned.flat_dims)
    return {
        WHOLE: list(every),
        WITHOUT: [dim for dim in every if dim not in taken],
        ONLY: sorted(taken),
        RANDOM: [dim for dim in every if dim not in others],
    }


def probe_values(
    flags: FlagSpec,
    unassigned: FlagSpec,
    fitted: Harvest,
    reported: Harvest,
    labels: NDArray[np.bool_],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Scores `[N, C]`, flat, of every probe on the examples that are reported.

    Args:
        flags, unassigned: which dimensions are left out.
        fitted: activations that probes are fitted on, with their `labels` `[n, C]`.
        reported: activations that they score.
        seed: of networks.
        progress: told of the probes fitted.
    """
    found: list[Measured] = []
    for layer, x in fitted.residual.items():
        for at, place in enumerate(PLACES):
            for name, dims in subsets(flags, unassigned).items():
                train, test = x[at][:, dims].numpy(), reported.residual[layer][at][:, dims].numpy()
                for probe in PROBES:
                    scores = fit_probes(train, labels, test, probe, seed)
                    key = {"layer": layer, "place": place, "dims": name, "probe": probe}
                    found.append(Measured(key, scores.flatten()))
                    if progress:
                        progress(1)
    return found


@dataclass(frozen=True, kw_only=True)
class ProbeAUC:
    """AUC of one kind of probe, mean over concepts."""

    moment: Moment
    layer: int
    """After which; −1 for the mean over layers."""
    place: str
    """`prompt`: at the last prompt token; `response`: of the mean over the response's tokens."""
    probe: str
    dims: str
    """What it reads: `all`, `without flags`, `flags only`, `without random`."""
    auc: Interval
    change: Interval | None
    """Since step 0."""
    beyond_plain: Interval | None
    """Above that of the plain finetuning at the same step; None where there is none."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Erosion(Result):
    """What probes read, over finetunings; 95% intervals over reported prompts."""

    probes: tuple[ProbeAUC, ...]

    def over_layers(self, place: str, probe: str, dims: str) -> list[ProbeAUC]:
        """Means over layers, moment by moment, run by run."""
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
        return f"change of linear probes' AUC without the flags' dimensions: {'; '.join(said)}"

    def tables(self) -> dict[str, Table]:
        last = {row.moment.run: row.moment.step for row in self.probes}
        scores = [
            Column("AUC", "auc", INTERVAL),
            Column("since step 0", "change", SIGNED),
            Column("beyond plain", "beyond_plain", SIGNED, note="equal steps", spare=1),
        ]
        which = [Column("place", "place"), Column("probe", "probe"), Column("dimensions", "dims", whole=True)]
        caption = "Mean over concepts and layers; 0.5 is chance. 95% intervals over reported prompts."
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

    def draw(self, ax: Axes, place: str = "response", probe: str = "linear", dims: str = WITHOUT) -> None:
        """AUC over steps, a curve for each run."""
        found: dict[str, list[ProbeAUC]] = {}
        for row in self.over_layers(place, probe, dims):
            found.setdefault(row.moment.run, []).append(row)
        curves = [
            Curve(run, [r.moment.step for r in rows], [r.auc.estimate for r in rows]) for run, rows in found.items()
        ]
        plot_curves(ax, curves, f"AUC, {dims}", steps="step")

    def draw_run(self, ax: Axes, run: str, place: str = "response", probe: str = "linear") -> None:
        """AUC over steps of one run, a curve for each set of dimensions."""
        curves = []
        for dims in (WHOLE, WITHOUT, ONLY, RANDOM):
            rows = [row for row in self.over_layers(place, probe, dims) if row.moment.run == run]
            curves.append(Curve(dims, [r.moment.step for r in rows], [r.auc.estimate for r in rows]))
        plot_curves(ax, curves, "AUC", steps="step")

    @property
    def figures(self) -> dict[str, Callable[[Axes], None]]:
        """Drawings by their captions."""
        about = {"response": "mean over the response's tokens", "prompt": "last prompt token"}
        found: dict[str, Callable[[Axes], None]] = {
            f"{probe} probes without the flags' dimensions, {about[place]}, mean over layers": partial(
                self.draw, place=place, probe=probe
            )
            for place in ("response", "prompt")
            for probe in PROBES
        }
        for run in dict.fromkeys(row.moment.run for row in self.probes):
            found[f"{run}: linear probes of all dimensions and of parts, {about['response']}"] = partial(
                self.draw_run, run=run
            )
        return found


def erosion_result(series: Sequence[Series], texts: LabelledTexts, resamples: Resamples) -> Erosion:
    """Intervals of what `probe_values` measured.

    Args:
        series: of each run.
        texts: the examples reported.
        resamples: of them.
    """
    aucs: dict[int, dict[tuple[int, str, str, str], Resampled]] = {}

    def of(part_rows: Sequence[Measured]) -> dict[tuple[int, str, str, str], Resampled]:
        known = aucs.get(id(part_rows))
        if known is None:
            known = {}
            for row in part_rows:
                key = row.key
                name = int(key["layer"]), str(key["place"]), str(key["probe"]), str(key["dims"])
                known[name] = mean_auc(row.values.reshape(texts.labels.shape), texts.labels, resamples)
            for place, probe, dims in dict.fromkeys(name[1:] for name in known):
                layers = [value for name, value in known.items() if name[1:] == (place, probe, dims)]
                known[MEAN, place, probe, dims] = Resampled.mean(layers)
            aucs[id(part_rows)] = known
        return known

    found: list[ProbeAUC] = []
    for one in series:
        beside = plain_parts(one, series)
        first = of(one.parts[0].rows)
        for moment, part in zip(one.moments, one.parts, strict=True):
            other = of(beside[moment.step].rows) if moment.step in beside else None
            for name, value in of(part.rows).items():
                layer, place, probe, dims = name
                found.append(
                    ProbeAUC(
                        moment=moment,
                        layer=layer,
                        place=place,
                        probe=probe,
                        dims=dims,
                        auc=value.interval,
                        change=(value - first[name]).interval if moment.step else None,
                        beyond_plain=(value - other[name]).interval if other and moment.step else None,
                    )
                )
    return Erosion(probes=tuple(found))
