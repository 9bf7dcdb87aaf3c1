"""Test 1 of Makelov, Lange and Nanda 2024: does a dictionary carry what the task needs, and nothing else does?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.cross_sections import Answers, PatchedPrompts
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
    at_mean: Answers | None = None,
) -> Approximation:
    """Patch in reconstructions, and what they leave out.

    Args:
        prompts: of the reported split.
        means: mean activation of each location, over the prompts that dictionaries were fitted on.
        rebuilt: â of each location.
        at_mean: the answers with every location at its mean, if they are known.
    """
    mean = at_mean or prompts.answers({place: means[place].expand_as(x) for place, x in rebuilt.items()})
    kept = prompts.answers(rebuilt)
    left = prompts.answers({p: means[p] + prompts.activations[p] - x for p, x in rebuilt.items()})
    c, m, k = (_differences(of) for of in (prompts.plain, mean, kept))
    return Approximation(
        clean=bootstrap_mean(c),
        mean=bootstrap_mean(m),
        sufficiency=bootstrap_ratio_of_sums(k, c),
        normalised_sufficiency=share_of_effect(prompts.plain, mean, kept),
        necessity=share_of_effect(prompts.plain, mean, left, lambda ratio: 1 - abs(ratio)),
        normalised_necessity=share_of_effect(prompts.plain, mean, left, lambda ratio: 1 - ratio),
    )


def share_of_effect(
    plain: Answers, mean: Answers, patched: Answers, transform: Callable[[FloatArray], FloatArray] | None = None
) -> Interval | None:
    """(LD_patched − LD_mean) / (LD_plain − LD_mean), transformed: how far from one end to the other; None where the
    interval of the denominator holds 0."""
    return _share(_differences(plain), _differences(mean), _differences(patched), transform)


def loss_recovered(
    prompts: PatchedPrompts,
    rebuilt: Mapping[Location, Float[Tensor, "P width"]],
    at_mean: Mapping[Location, Answers],
) -> dict[str, Interval | None]:
    """Per location patched alone: (L(ā) − L(â)) / (L(ā) − L), with L the mean of −log p(IO) over the vocabulary.

    Args:
        prompts: of the reported split.
        rebuilt: â of each location.
        at_mean: per location the answers with it alone at its mean.

    Returns:
        By location; None where the interval of L(ā) − L holds 0: the loss does not need this location.
    """
    clean, found = prompts.plain.loss.double().numpy(), dict[str, Interval | None]()
    for place, x in rebuilt.items():
        mean = at_mean[place].loss.double().numpy()
        needed = _share(clean, mean, clean) is not None
        found[str(place)] = _share(clean, mean, prompts.answers({place: x}).loss.double().numpy()) if needed else None
    return found


def _differences(answers: Answers) -> FloatArray:
    return answers.difference.double().cpu().numpy()


def _share(
    clean: FloatArray,
    mean: FloatArray,
    patched: FloatArray,
    transform: Callable[[FloatArray], FloatArray] | None = None,
) -> Interval | None:
    lost = bootstrap_mean(clean - mean)
    needed = lost.low > 0 or lost.high < 0
    return bootstrap_ratio_of_sums(patched - mean, clean - mean, transform=transform) if needed else None
