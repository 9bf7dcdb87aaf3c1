"""Whether a circuit holds all that answers, and whether it needs each of its heads (Wang et al. 2022, section 4).

A complete circuit answers as the model does whatever is taken from both: F(C \\ K) = F(M \\ K) for every set K of its
heads, where F is the logit difference and heads that are taken away are put to their means. In a minimal one each head
counts, by itself or when the other heads of its role are gone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from trimtab.evaluation.circuits.circuit import ROLES, Circuit
from trimtab.evaluation.circuits.faithfulness import random_circuit
from trimtab.evaluation.circuits.knock_outs import KnockOuts, Positions
from trimtab.lm import LanguageModel
from trimtab.runs.circuit_tables import (
    BESIDE,
    NOTHING,
    RANDOM,
    ROLE,
    completeness_table,
    knock_out_points,
    minimality_table,
)
from trimtab.runs.figures import plot_points
from trimtab.runs.results import Result
from trimtab.runs.tables import Table
from trimtab.stats import Interval, bootstrap_difference, bootstrap_mean, bootstrap_statistic
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class KnockOut:
    """The same heads taken from a circuit and from the whole model."""

    kind: str
    """nothing, a role, random heads, or random heads of a random circuit."""
    taken: str
    """The role, or the heads."""
    circuit: Interval
    """Logit difference of the circuit without them."""
    model: Interval
    """Of the model without them."""
    difference: Interval
    """Circuit minus model, over the same prompts."""


@dataclass(frozen=True, kw_only=True)
class HeadShare:
    """What a circuit loses with one head, in logits."""

    head: str
    roles: str
    alone: Interval
    """From the whole circuit."""
    last: Interval
    """From the circuit that lacks the other heads of its role; of several roles, the one where it counts most."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Completeness(Result):
    """A circuit and its model with the same heads taken away; and what each head adds."""

    model: str
    n_heads: int
    full: Interval
    """Logit difference of the plain model."""
    knock_outs: tuple[KnockOut, ...]
    incompleteness: Interval
    """Mean of |F(C without K) − F(M without K)| over random sets K of the circuit's heads, as a share of `full`."""
    beside: Interval | None
    """The same for random circuits of its size, each with a random set of its heads."""
    heads: tuple[HeadShare, ...]

    def headline(self) -> str:
        """How far circuit and model are apart."""
        beside = f", random circuits {self.beside:.2f}" if self.beside else ""
        return (
            f"Without random sets of its heads it is {self.incompleteness:.2f} of the logit difference from the model "
            f"without them{beside}"
        )

    def tables(self) -> dict[str, Table]:
        """Roles and the worst set that was found; what each head adds."""
        return {"completeness": completeness_table(self), "minimality": minimality_table(self)}

    def draw(self, ax: Axes) -> None:
        """Circuit against model, a dot for each set of heads that was taken from both."""
        plot_points(ax, knock_out_points(self), "model without the heads", "circuit without them")


def measure_completeness(
    model: LanguageModel,
    ioi: IOIDistribution,
    circuit: Circuit,
    prompts: Sequence[IOIPrompt],
    *,
    n_subsets: int = 12,
    seed: int = 0,
    runs: KnockOuts | None = None,
    progress: Callable[[int], None] | None = None,
) -> Completeness:
    """Take the same heads from a circuit and from its model, and each head from the circuit.

    Args:
        model: the one that the circuit is of.
        ioi: where the prompts are from.
        circuit: its heads are kept where their roles act.
        prompts: others than those by which the circuit was found.
        n_subsets: random sets of the circuit's heads (each head with a chance of one half), and as many random
            circuits of its size.
        seed: of the sentences for means, of random sets and circuits.
        runs: of these prompts with that seed, if there are some.
        progress: called with the number of sets and heads that are done.

    Raises:
        UserError: the circuit is of another model.
    """
    circuit.check(model)
    runs, positions = runs or KnockOuts(model, ioi, prompts, seed), circuit.positions()
    done = progress or (lambda _n: None)
    found: list[KnockOut] = []
    apart: dict[str, list[Tensor]] = {RANDOM: [], BESIDE: []}

    def take(kind: str, taken: Positions, of: Positions, name: str = "") -> None:
        rest, model_rest = runs.only(_less(of, taken)), runs.without(taken)
        name = name or ", ".join(f"{layer}.{head}" for layer, head in sorted(taken)) or NOTHING
        found.append(
            KnockOut(
                kind=kind,
                taken=name,
                circuit=bootstrap_mean(rest),
                model=bootstrap_mean(model_rest),
                difference=bootstrap_difference(rest, model_rest),
            )
        )
        apart.setdefault(kind, []).append(rest - model_rest)
        done(1)

    take(NOTHING, {}, positions)
    for role in ROLES:
        taken = {(head.layer, head.head): frozenset({ROLES[role].position}) for head in circuit.of(role)}
        if taken:
            take(ROLE, taken, positions, name=role)
    for number in range(n_subsets):
        take(RANDOM, _half(positions, seed * n_subsets + number), positions)
    for number in range(n_subsets):
        drawn = random_circuit(model, positions, seed * n_subsets + number)
        take(BESIDE, _half(drawn, seed * n_subsets + number), drawn)
    heads = _shares(circuit, runs, done)
    return Completeness(
        model=model.name, n_heads=len(positions), full=bootstrap_mean(runs.full), knock_outs=tuple(found),
        incompleteness=_share(apart[RANDOM] or apart[NOTHING], runs.full),
        beside=_share(apart[BESIDE], runs.full) if apart[BESIDE] else None, heads=heads,
    )  # fmt: skip


def _less(positions: Positions, taken: Positions) -> dict[tuple[int, int], frozenset[str]]:
    left = {key: names - taken.get(key, frozenset()) for key, names in positions.items()}
    return {key: names for key, names in left.items() if names}


def _half(positions: Positions, seed: int) -> dict[tuple[int, int], frozenset[str]]:
    """Each head with a chance of one half, but at least one."""
    rng, keys = random.Random(f"random-heads/{seed}"), sorted(positions)
    chosen = [key for key in keys if rng.random() < 0.5] or [rng.choice(keys)]
    return {key: positions[key] for key in chosen}


def _share(apart: Sequence[Tensor], full: Tensor) -> Interval:
    """Mean over sets of |mean over prompts|, as a share of the model's mean; prompts are resampled."""

    def share(rows: np.ndarray, whole: np.ndarray) -> float:
        return float(np.abs(rows.mean(0)).mean() / whole.mean())

    differences = np.stack([one.numpy() for one in apart], axis=1)  # [P, sets]
    return bootstrap_statistic(share, [differences, full.numpy()])


def _shares(circuit: Circuit, runs: KnockOuts, done: Callable[[int], None]) -> tuple[HeadShare, ...]:
    positions = circuit.positions()
    alone = runs.only(positions)
    found: list[HeadShare] = []
    for layer, head in sorted(positions):
        key, roles = (layer, head), [one.role for one in circuit.heads if (one.layer, one.head) == (layer, head)]
        lost = [alone - runs.only(_less(positions, {key: positions[key]}))]
        for role in roles:
            fellows = {(h.layer, h.head): positions[h.layer, h.head] for h in circuit.of(role)}
            rest = {other: names for other, names in fellows.items() if other != key}
            if rest:
                lost.append(runs.only(_less(positions, rest)) - runs.only(_less(positions, fellows)))
        last = max(lost[1:] or lost, key=lambda x: abs(float(x.mean())))
        found.append(
            HeadShare(
                head=f"{layer}.{head}",
                roles=", ".join(roles),
                alone=bootstrap_mean(lost[0]),
                last=bootstrap_mean(last),
            )
        )
        done(1)
    return tuple(found)
