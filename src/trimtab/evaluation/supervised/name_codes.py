"""Where IO and S meet: the lengths of their codes at each location of a circuit, and what editing either does there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.evaluation.circuits.circuit import Circuit
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.codes import Factors, mse_codes
from trimtab.evaluation.supervised.control import edit_supervised
from trimtab.evaluation.supervised.cross_sections import PatchedPrompts, cross_sections
from trimtab.evaluation.supervised.section import counterfactuals
from trimtab.lm import LanguageModel
from trimtab.stats import Interval, bootstrap_mean
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt

NAMES = ("IO", "S")


@dataclass(frozen=True, kw_only=True)
class NameCodes:
    """What the codes of IO and S are and do at a location."""

    location: str
    io_length: float
    """Of the codes of IO: root of the mean over values of u·u′ from two halves of the prompts, which noise does not
    lengthen; 0 where that is negative."""
    s_length: float
    io_effect: Interval
    """Change of the logit difference when IO is edited by codes here alone."""
    s_effect: Interval
    causal: bool
    """Whether both effects are beyond their intervals, and at least the circuit's share of the logit difference."""

    @property
    def ratio(self) -> float | None:
        """The longer over the shorter; None where one has no length."""
        short, long = sorted((self.io_length, self.s_length))
        return long / short if short else None


def name_locations(circuit: Circuit, model: LanguageModel) -> tuple[Location, ...]:
    """Every location of every cross-section that the circuit has. Raises a `UserError` where there is none."""
    return tuple(dict.fromkeys(place for places in cross_sections(circuit, model).values() for place in places))


class NameEdits(NamedTuple):
    """Prompts that can be patched, and counterfactuals of them."""

    prompts: PatchedPrompts
    changed: Mapping[str, Sequence[IOIPrompt]]

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        ioi: IOIDistribution,
        prompts: Sequence[IOIPrompt],
        locations: Sequence[Location],
        seed: int,
    ) -> NameEdits:
        """Draw names."""
        return cls(PatchedPrompts(model, ioi, prompts, locations), counterfactuals(ioi, prompts, seed))


def name_codes(
    edits: NameEdits, location: Location, train: Sequence[IOIPrompt], x: Float[Tensor, "P width"], share: float = 0.0
) -> NameCodes:
    """Lengths of the codes of IO and S at a location, and what editing either does.

    Args:
        edits: prompts on which effects are measured.
        location: where.
        train: prompts that codes are fitted on.
        x: their activations there.
        share: least effect that matters, as a share of the logit difference.
    """
    factors = Factors.of(train)
    rows = factors.rows(train)
    codes, own, plain = mse_codes(x, factors, rows), factors.rows(edits.prompts.prompts), edits.prompts.plain
    parts = [torch.arange(len(x)) // 2 % 2 == part for part in (0, 1)]  # patterns alternate, and both halves have both
    halves = [mse_codes(x[part], factors, rows[part]).vectors for part in parts]
    squared = (halves[0] * halves[1]).sum(1).split([len(values) for values in factors.values])
    in_both = torch.stack([torch.isin(torch.arange(len(factors.names)), rows[part]) for part in parts]).all(0)
    known = in_both.split([len(values) for values in factors.values])
    length: dict[str, float] = {}
    effect: dict[str, Interval] = {}
    for (attribute,), products, both in zip(factors.factors, squared, known, strict=True):
        if attribute in NAMES:
            length[attribute] = float(products[both].mean().clamp_min(0).sqrt()) if both.any() else 0.0
            edited = edit_supervised(
                edits.prompts.activations[location], codes, own, factors.rows(edits.changed[attribute])
            )
            change = edits.prompts.answers({location: edited.x}).difference - plain.difference
            effect[attribute] = bootstrap_mean(change.double().numpy())
    least = share * abs(float(plain.difference.mean()))
    return NameCodes(
        location=str(location), io_length=length["IO"], s_length=length["S"], io_effect=effect["IO"],
        s_effect=effect["S"], causal=all(_surely(one) > 1 and abs(one.estimate) >= least for one in effect.values()),
    )  # fmt: skip


def _surely(effect: Interval) -> float:
    """An effect over the distance to its bound that is nearer to zero; above 1 it is beyond its interval."""
    reach = effect.estimate - effect.low if effect.estimate > 0 else effect.high - effect.estimate
    return abs(effect.estimate) / reach if reach else float("inf") if effect.estimate else 0.0


def by_ratio(place: NameCodes) -> tuple[bool, float]:
    """The order of locations: where both matter, by the ratio of lengths; elsewhere by how surely the less sure of the
    two matters."""
    if place.causal and place.ratio is not None:
        return True, place.ratio
    return False, min(_surely(place.io_effect), _surely(place.s_effect))
