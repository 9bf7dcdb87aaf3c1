"""How much of an answer a circuit brings about: everything else is put to its mean, or the circuit alone is.

The mean of a head's output is taken over sentences of the same template that name three persons, so that it keeps what
the words are and loses who is named twice (Wang et al. 2022, section 4).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.evaluation.circuits.circuit import Circuit
from trimtab.evaluation.circuits.rows import PlainRun, PromptRows, logit_difference, rows_of
from trimtab.lm import LanguageModel, RowDelta, Site, TokenBatch, capture, edited
from trimtab.lm.unembedding import Unembedding
from trimtab.runs.results import Result
from trimtab.runs.tables import Column, Table
from trimtab.stats import Interval, bootstrap_mean, bootstrap_ratio_of_sums
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt

Positions = Mapping[tuple[int, int], frozenset[str]]
"""Per (layer, head) where it is kept."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Faithfulness(Result):
    """Logit differences, right name minus wrong one, over the same prompts."""

    model: str
    n_heads: int
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
        """Logit differences and what follows from them."""
        named = {
            "plain model": self.full, "every head at its mean": self.none, "the circuit alone": self.circuit,
            "the model without the circuit": self.without, "circuit / model": self.faithfulness,
            "between none (0) and model (1)": self.normalised,
        }  # fmt: skip
        if self.random:
            found = torch.tensor(self.random)
            low, high = torch.quantile(found, torch.tensor([0.025, 0.975])).tolist()
            middle = float(found.mean())
            of = f"{len(found)} random circuits, 95% of them"
            named[of] = Interval(estimate=middle, low=low, high=high, n=len(found), method="quantiles")
        rows = [{"what": what, "value": value} for what, value in named.items()]
        return {"faithfulness": Table(columns=[Column("", "what"), Column("", "value", ".3f")], rows=rows)}


class MeanHeads:
    """Mean outputs of all heads, token by token, for each template.

    Args:
        model: with attention sites.
        ioi: where the prompts are from.
        prompts: those that will be ablated; each stands for one sentence that names three persons.
        seed: of those sentences.
    """

    def __init__(self, model: LanguageModel, ioi: IOIDistribution, prompts: Sequence[IOIPrompt], seed: int = 0) -> None:
        self.model = model
        others: dict[str, list[IOIPrompt]] = {}
        for prompt in prompts:
            others.setdefault(prompt.template, []).append(ioi.without_repeat(prompt, seed=seed))
        sites = [Site("attn_z", layer) for layer in range(model.n_layers)]
        self.z: dict[str, list[Tensor]] = {}
        for template, same in others.items():
            sums: list[Tensor] = []
            for rows in rows_of([ioi.tokenise(prompt) for prompt in same], model):
                found = capture(model, TokenBatch.full(rows.ids), sites)
                parts = [found[site].float().sum(0) for site in sites]
                sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
            self.z[template] = [total / len(same) for total in sums]  # [T, heads, head_dim]

    @torch.no_grad()
    def logit_difference(
        self, rows: PromptRows, prompts: Sequence[IOIPrompt], keep: Bool[Tensor, "B T layers heads"]
    ) -> Float[Tensor, " B"]:
        """Of prompts whose heads are at their means wherever they are not kept."""
        batch, time = torch.ones_like(rows.ids).nonzero(as_tuple=True)

        def at(layer: int) -> Callable[[Tensor], RowDelta]:
            mean = torch.stack([self.z[prompts[number].template][layer] for number in rows.numbers])
            kept = keep[:, :, layer, :, None]
            values = torch.where(kept, torch.nan, mean).flatten(0, 1).flatten(1)
            return lambda _x: RowDelta(batch, time, torch.zeros_like(values), values)

        last = Site("resid_post", self.model.n_layers - 1)
        with edited(self.model, {Site("attn_z", layer): at(layer) for layer in range(self.model.n_layers)}):
            found = capture(self.model, TokenBatch.full(rows.ids), [last])[last]
        return logit_difference(Unembedding(self.model), rows.at(found, "END"), rows.answers)


def kept_heads(model: LanguageModel, rows: PromptRows, positions: Positions) -> Bool[Tensor, "B T layers heads"]:
    """Where the heads of a circuit stand in prompts."""
    attention = model.layout.layers[0].attention
    assert attention is not None
    keep = torch.zeros(*rows.ids.shape, model.n_layers, attention.n_heads, dtype=torch.bool, device=rows.ids.device)
    each = torch.arange(len(rows.ids), device=rows.ids.device)
    for (layer, head), names in positions.items():
        for name in names:
            keep[each, rows.positions[name], layer, head] = True
    return keep


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
        progress: called with the number of random circuits that are done.

    Raises:
        UserError: the circuit is of another model.
    """
    circuit.check(model)
    means, positions = MeanHeads(model, ioi, prompts, seed), circuit.positions()
    batches = list(rows_of([ioi.tokenise(prompt) for prompt in prompts], model))

    def differences(of: Positions, invert: bool = False) -> Tensor:
        parts = (means.logit_difference(rows, prompts, kept_heads(model, rows, of) ^ invert) for rows in batches)
        return torch.cat(list(parts)).cpu().double()

    unembedding = Unembedding(model)
    plain = [
        logit_difference(unembedding, rows.at(PlainRun.of(model, rows.ids).inputs[-1], "END"), rows.answers)
        for rows in batches
    ]
    full, none, alone = torch.cat(plain).cpu().double(), differences({}), differences(positions)
    beside = []
    for number in range(n_random):
        drawn = differences(random_circuit(model, positions, seed * n_random + number))
        beside.append(float((drawn - none).sum() / (full - none).sum()))
        if progress is not None:
            progress(1)
    return Faithfulness(
        model=model.name, n_heads=len(positions), full=bootstrap_mean(full), none=bootstrap_mean(none),
        circuit=bootstrap_mean(alone), without=bootstrap_mean(differences(positions, invert=True)),
        faithfulness=bootstrap_ratio_of_sums(alone, full),
        normalised=bootstrap_ratio_of_sums(alone - none, full - none), random=tuple(beside),
    )  # fmt: skip
