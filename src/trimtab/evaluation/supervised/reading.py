"""Reading values of attributes from activations: each factor alone, and from what the others' codes leave over.

Alone by linear discriminant analysis (Fisher 1936): classes have their own means and one covariance, that of what the
class means leave over, shrunk towards a multiple of the identity as far as Ledoit and Wolf (2004) say. The score of a
class is then linear in x, and so is that of a value once the codes of other factors are taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.evaluation.supervised.codes import Codes, Factors
from trimtab.stats import Interval, wilson_interval

FLOOR = 1e-6
"""Least variance along any direction, as a share of the mean variance: activations may have fewer dimensions."""


class LinearScores(NamedTuple):
    """Scores of values: those of row x are (x − mean) W + b."""

    W: Tensor  # [w, n]
    b: Tensor  # [n]


def discriminant_scores(
    x: Float[Tensor, "P w"], mean: Float[Tensor, " w"], factors: Factors, rows: Int[Tensor, "P F"]
) -> LinearScores:
    """Fit the scores of all values, each factor by itself.

    Args:
        x: activations of P prompts.
        mean: what is taken off them first.
        factors: the values.
        rows: of the same prompts, of `factors.rows`; every value is that of some prompt.
    """
    from sklearn.covariance import ledoit_wolf

    centred = x.double() - mean.double()
    floor = FLOOR * (centred - centred.mean(0)).square().mean()
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    weights, biases, start = [], [], 0
    for factor, values in enumerate(factors.values):
        own = rows[:, factor] - start
        counts = torch.bincount(own, minlength=len(values)).double()
        means = torch.zeros(len(values), x.shape[1], dtype=torch.float64).index_add_(0, own, centred)
        means /= counts[:, None]
        covariance = torch.from_numpy(ledoit_wolf((centred - means[own]).numpy(), assume_centered=True)[0])
        covariance += eye * (floor if floor > 0 else 1.0)
        W = torch.linalg.solve(covariance, means.T)
        weights.append(W)
        biases.append((counts / len(x)).log() - (means * W.T).sum(1) / 2)
        start += len(values)
    return LinearScores(torch.cat(weights, 1), torch.cat(biases))


def leftover_scores(x: Float[Tensor, "P w"], codes: Codes, rows: Int[Tensor, "P F"]) -> LinearScores:
    """Scores of each factor's values once the codes u of the other factors are taken off x − mean.

    What all codes leave over has one covariance Σ, shrunk as above: the score Σ⁻¹u − u Σ⁻¹ u / 2 is the log-likelihood
    of a value, up to what is the same for all.

    Args:
        x: activations of P prompts.
        codes: fitted on them.
        rows: of the same prompts, of `factors.rows`.
    """
    from sklearn.covariance import ledoit_wolf

    centred, u = x.double() - codes.mean.double(), codes.vectors.double()
    covariance = torch.from_numpy(ledoit_wolf((centred - u[rows].sum(1)).numpy(), assume_centered=True)[0])
    floor = FLOOR * (centred - centred.mean(0)).square().mean()
    W = torch.linalg.solve(covariance + torch.eye(x.shape[1]) * (floor if floor > 0 else 1.0), u.T)
    return LinearScores(W, -(u * W.T).sum(1) / 2)


def read_accuracy(found: Int[Tensor, "Q F"], rows: Int[Tensor, "Q F"], factors: Factors) -> Mapping[str, Interval]:
    """On what share of prompts each factor's value was read right, with Wilson's interval; by factor (`IO,Pos`).

    Args:
        found: the values that were read.
        rows: the true ones.
        factors: what they are of.
    """
    right = (found == rows).sum(0).tolist()
    names = (",".join(factor) for factor in factors.factors)
    return {name: wilson_interval(count, len(rows)) for name, count in zip(names, right, strict=True)}
