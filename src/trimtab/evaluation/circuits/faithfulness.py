"""How much of an answer a circuit brings about: every other head is put to its mean, or the circuit is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.evaluation.circuits.circuit import Circuit
from trimtab.evaluation.circuits.knock_outs import KnockOuts, Positions
from trimtab.lm import LanguageModel
from trimtab.runs.circuit_tables import faithfulness_table
from trimtab.runs.results import Result
from trimtab.runs.tables import Table
from trimtab.stats import Interval, bootstrap_mean, bootstrap_ratio_of_sums
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt


@dataclass(frozen=True, kw_only=True, repr=False)
class Faithfulness(Result):
    """Logit differences, right name minus wrong one, over the same prompts, and the plain model's accuracy."""

    model: str
    n_heads: int
    accuracy: Interval
    """Share of the prompts in which the plain model's likeliest token is the right name."""
    full: Interval
    """Of the plain model."""
    none: Interval
    """With every head at its mean."""
    circuit: Interval
    """With every head at its mean but the circuit's."""
    without: Interval
    """With the circuit's heads at their means: what is left shows what the circuit lacks."""
    faithfulness: Interval
    """circuit / full."""
    normalised: Interval
    """(circuit − none) / (full − none)."""
    random: tuple[float, ...]
    """`normalised` of random circuits that have as many heads at each position."""

    def headline(self) -> str:
        """The circuit's share beside the best random circuit's."""
        beside = f", the best of {len(self.random)} random circuits {max(self.random):.2f}" if self.random else ""
        return f"{self.n_heads} heads of {self.model} bring about {self.normalised:.2f} of the answer{beside}"

    def tables(self) -> dict[str, Table]:
        """Accuracy, logit differences and what follows from them."""
        return {"faithfulness": faithfulness_table(self)}


def random_circuit(model: LanguageModel, positions: Positions, seed: int) -> Positions:
    """As many heads at each position as a circuit has, drawn from the whole model."""
    attention = model.layout.layers[0].attention
    assert attention is not None
    every = [(layer, head) for layer in range(model.n_layers) for head in range(attention.n_heads)]
    rng, found = random.Random(f"random-circuit/{seed}"), dict[tuple[int, int], frozenset[str]]()
    for name in sorted({name for names in positions.values() for name in names}):
        for key in rng.sample(every, sum(name in names for names in positions.values())):
            found[key] = found.get(key, frozenset()) | {name}
    return found


def measure_faithfulness(
    model: LanguageModel,
    ioi: IOIDistribution,
    circuit: Circuit,
    prompts: Sequence[IOIPrompt],
    *,
    n_random: int = 100,
    seed: int = 0,
    runs: KnockOuts | None = None,
    progress: Callable[[int], None] | None = None,
) -> Faithfulness:
    """Hold a circuit against the whole model, none of it, and random circuits of its size.

    Args:
        model: the one that the circuit is of.
        ioi: where the prompts are from.
        circuit: its heads are kept where their roles act.
        prompts: others than those by which the circuit was found.
        n_random: random circuits.
        seed: of the sentences for means, and of random circuits.
        runs: of these prompts with that seed, if there are some.
        progress: called with the number of random circuits that are done.

    Raises:
        UserError: the circuit is of another model.
    """
    circuit.check(model)
    runs, positions = runs or KnockOuts(model, ioi, prompts, seed), circuit.positions()
    full, alone, none = runs.full, runs.only(positions), runs.none
    beside: list[float] = []
    for number in range(n_random):
        drawn = runs.only(random_circuit(model, positions, seed * n_random + number))
        beside.append(float((drawn - none).sum() / (full - none).sum()))
        if progress is not None:
            progress(1)
    return Faithfulness(
        model=model.name, n_heads=len(positions), accuracy=bootstrap_mean(runs.right), full=bootstrap_mean(full),
        none=bootstrap_mean(none), circuit=bootstrap_mean(alone), without=bootstrap_mean(runs.without(positions)),
        faithfulness=bootstrap_ratio_of_sums(alone, full),
        normalised=bootstrap_ratio_of_sums(alone - none, full - none), random=tuple(beside),
    )  # fmt: skip
