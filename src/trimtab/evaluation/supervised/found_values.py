"""Which values of an attribute have a feature of their own: chosen on train rows, and its F1 measured on others."""

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


def chosen_f1(
    fired: Bool[Tensor, "P n"],
    values: Int[Tensor, " P"],
    test_fired: Bool[Tensor, "Q n"],
    test_values: Int[Tensor, " Q"],
) -> Float[Tensor, " V"]:
    """Per value that test rows have, in order, the F1 of one feature's firing on them.

    It is the feature with the largest F1 on train rows, so that the number is not the best of many on the same rows; 0
    where no feature fires on train rows with the value.

    Args:
        fired: which features fire on train rows.
        values: of these rows; numbers stand for the same values as those of test rows.
        test_fired: the same features on other rows.
        test_values: of those.
    """
    present = test_values.unique()
    best, feature = f1_scores(fired, values[:, None] == present).max(0)
    own = f1_scores(test_fired, test_values[:, None] == present)
    return torch.where(best > 0, own[feature, torch.arange(len(present))], 0.0)


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
