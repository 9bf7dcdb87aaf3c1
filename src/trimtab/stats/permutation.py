"""Permutation tests of a difference of means: sign flips for paired samples, relabelling for unpaired ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from trimtab.errors import UserError
from trimtab.stats.samples import FloatArray, as_sample, per_prompt, same_length

Alternative = Literal["two-sided", "greater", "less"]

_BLOCK = 2_000_000
"""Signs or labels held at once."""


class PermutationResult(NamedTuple):
    """What a permutation test found."""

    difference: float
    """mean(a) − mean(b)."""
    p_value: float
    """Probability of a difference at least as extreme if the labels meant nothing."""
    n: int
    """Prompts: pairs, or both samples together."""
    n_permutations: int
    """Rearrangements looked at."""
    exact: bool
    """Whether those were all there are; otherwise the observed one is counted in, (1 + hits) / (1 + drawn)."""


def permutation_test(
    a: ArrayLike,
    b: ArrayLike,
    *,
    paired: bool = True,
    alternative: Alternative = "two-sided",
    n_permutations: int = 10_000,
    seed: int = 0,
) -> PermutationResult:
    """Test mean(a) = mean(b) by rearranging labels; exact where all rearrangements number `n_permutations` or fewer.

    Args:
        a, b: `[P]` or `[S, P]` (seeds are averaged within their prompt first).
        paired: the same prompts in the same order; flips the sign of each difference. Otherwise labels are shuffled.
        alternative: "greater" asks whether mean(a) > mean(b).
        n_permutations: random rearrangements drawn where exact counting would take more.
        seed: seed of the draws.

    Raises:
        UserError: empty or non-finite values, or paired samples that do not match.
    """
    sample_a, sample_b = per_prompt(as_sample(a, "a")), per_prompt(as_sample(b, "b"))
    if n_permutations < 1:
        raise UserError(f"n_permutations {n_permutations}", "at least one is needed")
    rng = np.random.default_rng(seed)
    if paired:
        same_length(sample_a, sample_b)
        difference = sample_a - sample_b
        n, count = difference.size, 2.0**difference.size
        observed, scale = float(difference.mean()), float(np.abs(difference).mean())
    else:
        pooled = np.concatenate([sample_a, sample_b])
        n, count = pooled.size, float(math.comb(pooled.size, sample_a.size))
        observed, scale = float(sample_a.mean() - sample_b.mean()), float(np.ptp(pooled))
        difference = pooled
    exact = count <= n_permutations
    if paired:
        blocks = _all_sign_flips(difference) if exact else _random_sign_flips(difference, n_permutations, rng)
    elif exact:
        blocks = _all_relabellings(difference, sample_a.size)
    else:
        blocks = _random_relabellings(difference, sample_a.size, n_permutations, rng)
    slack = 1e-12 * scale
    hits = sum(_hits(block, observed, alternative, slack) for block in blocks)
    p_value = hits / count if exact else (1 + hits) / (1 + n_permutations)
    return PermutationResult(observed, p_value, n, int(count) if exact else n_permutations, exact)


def _hits(draws: FloatArray, observed: float, alternative: Alternative, slack: float) -> int:
    """How many draws are at least as extreme as the observed difference; `slack` lets rounding count as a tie."""
    if alternative == "two-sided":
        return int((np.abs(draws) >= abs(observed) - slack).sum())
    if alternative == "greater":
        return int((draws >= observed - slack).sum())
    return int((draws <= observed + slack).sum())


def _all_sign_flips(difference: FloatArray) -> Iterator[FloatArray]:
    places = np.arange(difference.size)
    patterns = np.arange(1 << difference.size).reshape(-1, 1)
    bits = np.bitwise_and(np.right_shift(patterns, places), 1).astype(np.float64)
    yield (1 - 2 * bits) @ difference / difference.size


def _random_sign_flips(difference: FloatArray, n_draws: int, rng: np.random.Generator) -> Iterator[FloatArray]:
    for step in _steps(difference.size, n_draws):
        signs = rng.integers(2, size=(step, difference.size), dtype=np.int8) * 2 - 1
        yield signs.astype(np.float64) @ difference / difference.size


def _all_relabellings(pooled: FloatArray, n_a: int) -> Iterator[FloatArray]:
    choices = np.asarray(list(itertools.combinations(range(pooled.size), n_a)))
    yield _difference_of_sums(pooled[choices].sum(axis=1), pooled, n_a)


def _random_relabellings(pooled: FloatArray, n_a: int, n_draws: int, rng: np.random.Generator) -> Iterator[FloatArray]:
    for step in _steps(pooled.size, n_draws):
        shuffled = rng.permuted(np.broadcast_to(pooled, (step, pooled.size)), axis=1)
        yield _difference_of_sums(shuffled[:, :n_a].sum(axis=1), pooled, n_a)


def _difference_of_sums(sums_a: FloatArray, pooled: FloatArray, n_a: int) -> FloatArray:
    return sums_a / n_a - (pooled.sum() - sums_a) / (pooled.size - n_a)


def _steps(n: int, n_draws: int) -> Iterator[int]:
    """Block sizes that add up to `n_draws`."""
    step = max(1, _BLOCK // n)
    for start in range(0, n_draws, step):
        yield min(step, n_draws - start)
