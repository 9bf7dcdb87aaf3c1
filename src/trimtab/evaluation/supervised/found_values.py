"""Which values of an attribute have a feature of their own: the best F1 that any feature has for each value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.evaluation.supervised.interpretability import f1_scores
from trimtab.stats import Interval, bootstrap_mean, crossed_mean


@torch.no_grad()
def fires(dictionary: Dictionary, x: Float[Tensor, "P width"]) -> Bool[Tensor, "P n"]:
    """Which features fire on which rows."""
    return dictionary.encode(x) > 0


def best_f1(fired: Bool[Tensor, "P n"], values: Int[Tensor, " P"]) -> Float[Tensor, " V"]:
    """Per value that rows have, in order, the largest F1 that a feature's firing has against it."""
    present, own = values.unique(return_inverse=True)
    truth = own[:, None] == torch.arange(len(present))
    return f1_scores(fired, truth).max(0).values


def n_found(found: Sequence[Bool[Tensor, " V"]]) -> Interval:
    """How many of V values have a feature: the mean over trainings.

    Args:
        found: of each training. Negative differences of two such lists are fine, too.

    Returns:
        With an interval over trainings and values (`crossed_mean`), or over values where there is one training.
    """
    sample = torch.stack(list(found)).double().numpy()
    share = crossed_mean(sample) if len(sample) > 1 else bootstrap_mean(sample)
    return share.scaled(sample.shape[1])
