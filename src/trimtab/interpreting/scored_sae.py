"""What is known of a trained SAE in the study of interpretability and utility, and a bank of them that is made up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

SELECTED = "selected_"
"""Columns of a table that begin so hold the utility after the selection that they are named after."""
_WORDS = ("model", "architecture")
_NEEDED = (*_WORDS, "sparsity", "interpretability", "utility")


@dataclass(frozen=True, kw_only=True)
class ScoredSAE:
    """One SAE and its scores."""

    model: str
    architecture: str
    sparsity: float
    """L0 that it was trained to."""
    interpretability: float
    """Such as the mean accuracy of autointerp over its features."""
    utility: float
    """Such as the mean steering score of its features, before any selection."""
    selected: Mapping[str, float] = field(default_factory=dict[str, float])
    """Mean utility of the features that a selection keeps, by the selection's name."""
    explained_variance: float | None = None
    dead_share: float | None = None
    """Share of the features that never fire."""
    interpretability_parts: tuple[float, ...] = ()
    """Two or more scores that `interpretability` is the mean of: of its features, or of two halves of them."""
    utility_parts: tuple[float, ...] = ()
    """The same of `utility`."""
    interpretability_shuffled: float | None = None
    """The score if the judge's answers are shuffled among what it was asked: what it owes to no judgement at all."""
    utility_shuffled: float | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.model}, {self.architecture}, L0 {self.sparsity:g}"

    def values(self) -> Iterator[tuple[str, float]]:
        """All its numbers, by the names of a table's columns."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Mapping):
                yield from ((SELECTED + key, number) for key, number in cast("Mapping[str, float]", value).items())
            elif isinstance(value, tuple):
                yield from ((one.name, number) for number in cast("tuple[float, ...]", value))
            elif value is not None and one.name not in _WORDS:
                yield one.name, value


def read_scored_saes(table: pd.DataFrame | Iterable[ScoredSAE | Mapping[str, Any]]) -> list[ScoredSAE]:
    """SAEs of a table whose columns are the fields of `ScoredSAE`, and `selected_NAME` for each selection.

    Args:
        table: a frame of pandas, or rows as mappings, or SAEs, which are checked.

    Raises:
        UserError: a column is missing or unknown, a value is not a finite number, or some SAEs have what others lack.
    """
    to_rows: Any = getattr(table, "to_dict", None)
    rows: Any = to_rows("records") if callable(to_rows) else table
    saes = [row if isinstance(row, ScoredSAE) else _of_row(row) for row in rows]
    for sae in saes:
        for name, value in sae.values():
            if not math.isfinite(value):
                raise UserError(f"{name} of {sae.name}", f"{value} is not a finite number", "leave that SAE out")
        for name in ("interpretability_parts", "utility_parts"):
            if len(getattr(sae, name)) == 1:
                raise UserError(f"{name} of {sae.name}", "a single part has no halves", "give two or more, or none")
    known = [{name for name, _ in sae.values()} for sae in saes]
    for name in sorted(set[str]().union(*known)):
        lack = [sae.name for sae, names in zip(saes, known, strict=True) if name not in names]
        if lack:
            raise UserError(
                f"{name} of {lack[0]}", f"{len(lack)} of {len(saes)} SAEs lack it", "give it for all or none"
            )
    return saes


def _of_row(row: Mapping[str, Any]) -> ScoredSAE:
    names = [one.name for one in fields(ScoredSAE) if one.name != "selected"]
    for name in row:
        if name not in names and not name.startswith(SELECTED):
            hint = did_you_mean(name, names, f"selections are columns {SELECTED}NAME")
            raise UserError(f"column {name!r}", f"a table of SAEs has {', '.join(names)} and {SELECTED}NAME", hint)
    for name in _NEEDED:
        if name not in row:
            raise UserError("a table of SAEs", f"it has no column {name!r}", f"it needs {', '.join(_NEEDED)}")
    found: dict[str, Any] = {}
    for name, value in row.items():
        if value is None and name not in _NEEDED:
            continue
        try:
            found[name] = _read(name, value)
        except (TypeError, ValueError):
            raise UserError(f"{name} {value!r}", "it is not a number", "give a number") from None
    selected = {name.removeprefix(SELECTED): found.pop(name) for name in list(found) if name.startswith(SELECTED)}
    return ScoredSAE(**found, selected=selected)


def _read(name: str, value: Any) -> Any:
    if name in _WORDS:
        return str(value)
    return tuple(map(float, value)) if name.endswith("_parts") else float(value)


def simulate_saes(
    tau: float,
    *,
    tau_after: float | None = None,
    shared: float = 0.0,
    n_parts: int = 20,
    noise: float = 1.0,
    models: Iterable[str] = ("A", "B", "C"),
    architectures: Iterable[str] = ("batchtopk", "gated", "jumprelu", "relu", "topk"),
    sparsities: Iterable[float] = (50, 80, 160, 320, 520, 820),
    seed: int = 0,
) -> list[ScoredSAE]:
    """A bank whose truth is known: all scores are normal up to a monotone change, and models differ in their levels.

    Args:
        tau: of interpretability and utility before selection, without the noise of parts and what is `shared`; 0 makes
            them independent, 1 the same.
        tau_after: the same after selection. By default what selection (`added`) adds is independent of all else.
        shared: share of the variance of both that explained variance accounts for.
        n_parts: parts of each score.
        noise: standard deviation of a part, in standard deviations of the SAEs.
        models, architectures, sparsities: one SAE for each combination.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    cells = list(product(models, architectures, sparsities))
    names = list(dict.fromkeys(cell[0] for cell in cells))
    level = rng.normal(size=(2, len(names)))[:, [names.index(cell[0]) for cell in cells]]
    quality, mind, own, other, free = rng.normal(size=(5, len(cells)))

    def agreeing(t: float, rest: NDArray[np.float64]) -> NDArray[np.float64]:
        r = math.sin(math.pi * t / 2)  # Greiner 1909
        return math.sqrt(shared) * quality + math.sqrt(1 - shared) * (r * mind + math.sqrt(1 - r * r) * rest)

    def parts(score: NDArray[np.float64]) -> NDArray[np.float64]:
        return score[:, None] + noise * rng.normal(size=(len(cells), n_parts))

    interpretability, shuffled = parts(agreeing(1, own)), rng.normal(size=(2, len(cells)))
    utility = np.exp(0.3 * (parts(agreeing(tau, own)) + 0.3 * level[1][:, None])) * 0.15
    before = utility.mean(axis=1)
    after = before + 0.2 * np.exp(0.3 * free)
    if tau_after is not None:
        after = np.exp(0.3 * (parts(agreeing(tau_after, other)).mean(axis=1) + 0.3 * level[1])) * 0.35
    interpretability = 0.8 + 0.03 * (interpretability + 0.3 * level[0][:, None])
    return [
        ScoredSAE(
            model=model,
            architecture=architecture,
            sparsity=sparsity,
            interpretability=float(interpretability[i].mean()),
            utility=float(before[i]),
            selected={"added": float(after[i])},
            explained_variance=float(0.8 + 0.03 * quality[i]),
            dead_share=float(0.1 * abs(rng.normal())),
            interpretability_parts=tuple(interpretability[i].tolist()),
            utility_parts=tuple(utility[i].tolist()),
            interpretability_shuffled=float(shuffled[0, i]),
            utility_shuffled=float(shuffled[1, i]),
        )
        for i, (model, architecture, sparsity) in enumerate(cells)
    ]
