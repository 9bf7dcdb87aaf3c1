"""Test 1 of Makelov, Lange and Nanda 2024: does a dictionary carry what the task needs, and nothing else does?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.cross_sections import PatchedPrompts
from trimtab.stats import Interval, bootstrap_mean, bootstrap_ratio_of_sums

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """Logit differences of a cross-section, and what follows from them; 1 is as good as the model."""

    clean: Interval
    """Of the plain model."""
    mean: Interval
    """With every location at its mean."""
    sufficiency: Interval
    """The paper's: the logit difference with a replaced by â, over the plain one."""
    normalised_sufficiency: Interval | None
    """(LD(â) − LD(ā)) / (LD − LD(ā)): 0 for the mean, 1 for the activation itself. None, as the next two, where the
    interval of LD − LD(ā) holds 0: the model does not need this cross-section, and the ratio says nothing."""
    necessity: Interval | None
    """The paper's: 1 − |LD(ā) − LD(ā + a − â)| / |LD(ā) − LD|. 1 if what â leaves out does nothing."""
    normalised_necessity: Interval | None
    """1 − (LD(ā + a − â) − LD(ā)) / (LD − LD(ā)), which may exceed 1."""


def approximation(
    prompts: PatchedPrompts,
    means: Mapping[Location, Float[Tensor, " width"]],
    rebuilt: Mapping[Location, Float[Tensor, "P width"]],
) -> Approximation:
    """Patch in reconstructions, and what they leave out.

    Args:
        prompts: of the reported split.
        means: mean activation of each location, over the prompts that dictionaries were fitted on.
        rebuilt: â of each location.
    """
    clean = prompts.plain.difference
    mean = prompts.answers({place: means[place].expand_as(x) for place, x in rebuilt.items()}).difference
    kept = prompts.answers(rebuilt).difference
    left = prompts.answers({p: means[p] + prompts.activations[p] - x for p, x in rebuilt.items()}).difference
    c, m, k, rest = (value.double().cpu().numpy() for value in (clean, mean, kept, left))
    lost = bootstrap_mean(c - m)
    needed = lost.low > 0 or lost.high < 0

    def share(of: FloatArray, transform: Callable[[FloatArray], FloatArray]) -> Interval | None:
        return bootstrap_ratio_of_sums(of - m, c - m, transform=transform) if needed else None

    return Approximation(
        clean=bootstrap_mean(c),
        mean=bootstrap_mean(m),
        sufficiency=bootstrap_ratio_of_sums(k, c),
        normalised_sufficiency=share(k, lambda ratio: ratio),
        necessity=share(rest, lambda ratio: 1 - abs(ratio)),
        normalised_necessity=share(rest, lambda ratio: 1 - ratio),
    )


def loss_recovered(
    prompts: PatchedPrompts,
    means: Mapping[Location, Float[Tensor, " width"]],
    rebuilt: Mapping[Location, Float[Tensor, "P width"]],
) -> dict[str, Interval | None]:
    """Per location patched alone: (L(ā) − L(â)) / (L(ā) − L), with L the mean of −log p(IO) over the vocabulary.

    None where the interval of L(ā) − L holds 0: the loss does not need this location.
    """
    clean, found = prompts.plain.loss.double().numpy(), dict[str, Interval | None]()
    for place, x in rebuilt.items():
        mean = prompts.answers({place: means[place].expand_as(x)}).loss.double().numpy()
        lost = bootstrap_mean(mean - clean)
        needed = lost.low > 0 or lost.high < 0
        kept = prompts.answers({place: x}).loss.double().numpy() if needed else mean
        found[str(place)] = bootstrap_ratio_of_sums(mean - kept, mean - clean) if needed else None
    return found
