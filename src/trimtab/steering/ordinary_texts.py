"""Which of a steered model's texts are still ordinary, and at which dose they no longer are.

A text is ordinary if the unsteered model finds it as likely as its own texts, no less and no more (salad is less so,
loops are more so), and it repeats itself no more than they do. Its own texts are the unsteered ones of the same
prompts; where these are few, those behind neutral openings, decoded alike, are counted with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimtab.lm import DecodeConfig, Decoded, LanguageModel, decode
from trimtab.runs import ASSETS, read_json
from trimtab.stats import Interval, bootstrap_mean, wilson_interval
from trimtab.steering.fluency import BAND, Band, repetition

ENOUGH = 20
"""Unsteered texts that say by themselves what is ordinary."""
BROKEN = 0.5
"""Fluency is broken where a smaller share of an arm's texts than this is ordinary."""


@dataclass(frozen=True, kw_only=True)
class OrdinaryText:
    """What the unsteered model's own texts are like."""

    low: float
    """Mean negative log-likelihood of a text under it, in nats per token: from here."""
    high: float
    """To here."""
    repetition: float
    """Share of repeated 4-grams, at most."""
    n_own: int
    """Unsteered texts of the same prompts that say so."""
    n_neutral: int
    """Texts behind neutral openings that do."""


@dataclass(frozen=True, kw_only=True)
class Fluency:
    """How ordinary an arm's texts are; intervals over prompts."""

    ordinary: Interval
    """Share of texts."""
    nll: Interval
    """Mean negative log-likelihood of a text under the unsteered model, in nats per token."""
    repetition: Interval
    """Share of 4-grams that occurred before in the same text."""
    broken: bool
    """Whether too few texts are ordinary: a smaller share than `BROKEN`, whatever the interval."""


def ordinary_text(
    model: LanguageModel, config: DecodeConfig, nll: Sequence[float], tokens: Sequence[Sequence[int]], *, chat: bool
) -> OrdinaryText:
    """What is ordinary.

    Args:
        model: the model.
        config: how texts are decoded.
        nll: of the unsteered texts, in nats per token.
        tokens: of the same texts.
        chat: whether prompts are put into the chat template.
    """
    known, repeated = list(nll), list(map(repetition, tokens))
    if len(known) < ENOUGH:
        openings = (read_json(ASSETS / "demo_prompts.json") or {})["validation"]
        more: Decoded = decode(model, [model.encode_text(text, chat=chat) for text in openings], config)
        known += [-mean(logp) for logp in more.token_logp]
        repeated += map(repetition, more.token_ids)
    low, high = Band.of(known)
    most = float(np.quantile(repeated, BAND[1]))
    return OrdinaryText(low=low, high=high, repetition=most, n_own=len(nll), n_neutral=len(known) - len(nll))


def are_ordinary(ordinary: OrdinaryText, nll: ArrayLike, tokens: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    """Whether each of some texts is as likely as ordinary ones, no less and no more, and repeats itself no more.

    Args:
        ordinary: what is ordinary.
        nll, tokens: of the texts.
    """
    repeated = np.array([repetition(one) for one in tokens])
    return Band(ordinary.low, ordinary.high).holds(nll) & (repeated <= ordinary.repetition)


def fluency(
    ordinary: OrdinaryText, nll: Sequence[float], tokens: Sequence[Sequence[int]], n_prompts: int, seed: int
) -> Fluency:
    """How ordinary texts are.

    Args:
        ordinary: what is.
        nll, tokens: of the texts, all of a prompt's behind each other.
        n_prompts: of them.
        seed: of the resampling.
    """
    repeated, inside = np.array([repetition(one) for one in tokens]), are_ordinary(ordinary, nll, tokens)

    def over_prompts(values: NDArray[np.float64], most: float = math.inf) -> Interval:
        return bootstrap_mean(values.reshape(n_prompts, -1).T, seed=seed).within(0.0, most)

    one_each = inside.size == n_prompts
    return Fluency(
        ordinary=wilson_interval(inside.sum(), n_prompts) if one_each else over_prompts(inside.astype(np.float64), 1.0),
        broken=bool(inside.mean() < BROKEN),
        nll=over_prompts(np.asarray(nll, dtype=np.float64)),
        repetition=over_prompts(repeated, 1.0),
    )
