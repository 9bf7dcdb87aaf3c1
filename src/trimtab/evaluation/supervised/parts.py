"""Activations as sums of parts: a bias, what a contender's features add, and the error that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.codes import Codes, Factors
from trimtab.evaluation.supervised.rotation import Rotation
from trimtab.tasks.ioi_prompts import ATTRIBUTES, IOIPrompt

BIAS, ERROR = 0, 1
"""The first two parts of every activation."""


class FittedCodes(NamedTuple):
    """Supervised codes at a location, and the factors whose values they stand for."""

    codes: Codes
    factors: Factors


Splitter = FittedCodes | Rotation | Dictionary
Splitters = Mapping[Location, Splitter]
"""What takes activations apart, per location."""


class Parts(NamedTuple):
    """P activations, each as a sum of bias, error and active features."""

    name: Callable[[int], str]  # of each of n parts
    n: int
    which: Tensor  # [P, a] which part; what is not used is zeros of part 0
    vectors: Tensor  # [P, a, w]


def width_of(one: Splitter, place: Location) -> int:
    """Of the activations that something takes apart at a location; 0 if it has nothing for it."""
    if isinstance(one, Rotation):
        return len(one.means.get(place, ()))
    return one.d_in if isinstance(one, Dictionary) else len(one.codes.mean)


@torch.no_grad()
def n_parts(one: Splitter, x: Float[Tensor, "P w"]) -> Int[Tensor, " P"]:
    """How many parts each activation has, bias and error included, without taking it apart."""
    if isinstance(one, Dictionary):
        return 2 + (one.encode(x) != 0).sum(1)
    return torch.full((len(x),), 2 + len(ATTRIBUTES if isinstance(one, Rotation) else one.factors.factors))


def split(one: Splitter, place: Location, x: Float[Tensor, "P w"], prompts: Sequence[IOIPrompt]) -> Parts:
    """Activations of prompts at a location as sums.

    Raises:
        UserError: a value without a code.
    """
    if isinstance(one, Dictionary):
        return split_dictionary(one, x)
    return split_rotation(one, place, x) if isinstance(one, Rotation) else split_codes(one, x, prompts)


def split_codes(fitted: FittedCodes, x: Float[Tensor, "P w"], prompts: Sequence[IOIPrompt]) -> Parts:
    """Mean, what the codes leave out, and one part for each factor.

    Raises:
        UserError: a value without a code.
    """
    codes, factors = fitted
    vectors = codes.vectors[factors.rows(prompts)]
    return _named_parts(x, codes.mean, vectors, [",".join(factor) for factor in factors.factors])


def split_rotation(rotation: Rotation, place: Location, x: Float[Tensor, "P w"]) -> Parts:
    """Mean, what is in no subspace, and the coordinates about the mean in each attribute's."""
    mean = rotation.means[place]
    blocks = [rotation.block(place, attribute) for attribute in ATTRIBUTES]
    return _named_parts(x, mean, torch.stack([(x - mean) @ block @ block.T for block in blocks], 1), ATTRIBUTES)


def _named_parts(
    x: Float[Tensor, "P w"], mean: Float[Tensor, " w"], vectors: Float[Tensor, "P a w"], names: Sequence[str]
) -> Parts:
    error = x - mean - vectors.sum(1)
    whole = torch.cat([mean.expand_as(x)[:, None], error[:, None], vectors], 1)
    named = ("mean", "error", *names)
    return Parts(named.__getitem__, len(named), torch.arange(len(named)).expand(len(x), -1), whole)


@torch.no_grad()
def split_dictionary(dictionary: Dictionary, x: Float[Tensor, "P w"]) -> Parts:
    """What the dictionary gives without features, what it leaves out, and one part for each active feature."""
    f, rows = dictionary.encode(x), dictionary.W_dec.detach()
    bias = dictionary.rebuild(torch.zeros_like(f), x)
    counts = (f != 0).sum(1)
    most = max(1, int(counts.max())) if len(f) else 1
    value, index = f.abs().topk(most, dim=1)
    value = f.gather(1, index)
    features = (value * dictionary.code_unit(x))[..., None] * rows[index]
    whole = torch.cat([bias[:, None], (x - bias - features.sum(1))[:, None], features], 1)
    first = torch.tensor([BIAS, ERROR], device=index.device).expand(len(x), -1)
    index = torch.cat([first, torch.where(value == 0, BIAS, index + 2)], 1)
    return Parts(lambda n: ("bias", "error")[n] if n < 2 else str(n - 2), dictionary.n_features + 2, index, whole)
