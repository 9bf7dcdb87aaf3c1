"""What a model's flags say of held-out responses, and how well the model predicts them, with nothing forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from trimtab.flags.examples import Encoded, Example, batch_of, encode
from trimtab.flags.loss import FlagReading, response_loss
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.runs import Meter
from trimtab.stats import Interval, bootstrap_ratio_of_sums, bootstrap_statistic, wilson_interval

READS_ON = 0.5
"""Strength above which a flag reads on."""


@dataclass(frozen=True, kw_only=True)
class ConceptAccuracy:
    """How well one flag reads: its mean over a response's tokens, sites and dimensions against half its target."""

    concept: str
    dims: tuple[int, ...]
    on: Interval | None
    """Share of the responses that need the concept whose flag reads on; None if there is none."""
    off: Interval | None
    """Share of the others whose flag reads off."""


@dataclass(frozen=True, kw_only=True)
class FlagMeasures:
    """Measured on examples, nothing forced; intervals resample examples."""

    examples: int
    tokens: int
    """Of their responses."""
    cross_entropy: Interval
    """Nats per token of the responses."""
    flag_loss: Interval
    """Mean over tokens, sites and dimensions."""
    accuracy: Interval | None
    """Mean over concepts of the mean of `on` and `off`: 0.5 is chance, whatever the shares of labels. None if no
    concept has both kinds of examples."""
    concepts: tuple[ConceptAccuracy, ...]


class _Sums(NamedTuple):
    """Per example."""

    cross_entropy: list[float]
    flag_loss: list[float]
    tokens: list[int]
    strength: list[list[float]]


def measure_flags(
    model: LanguageModel,
    flags: FlagSpec,
    examples: Sequence[Example],
    *,
    chat: bool = False,
    max_tokens: int = 256,
    batch_size: int = 8,
    loss: str = "normalised_l1",
    seed: int = 0,
) -> FlagMeasures:
    """Read a model's flags while it reads examples.

    Args:
        model: the model.
        flags: where its flags are, or would be.
        examples: with the concepts that their responses need.
        chat, max_tokens: as in `FlagTraining`.
        batch_size: examples of a forward pass.
        loss: form of the flags' loss.
        seed: of the bootstrap.

    Raises:
        UserError: an example names an unknown concept or leaves no room for its response, or there is none.
    """
    return measure_encoded(
        model, flags, examples, encode(model, examples, chat=chat, max_tokens=max_tokens), batch_size, loss, seed
    )


@torch.no_grad()
def measure_encoded(
    model: LanguageModel,
    flags: FlagSpec,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    batch_size: int,
    loss: str,
    seed: int,
) -> FlagMeasures:
    """`measure_flags` of examples that are tokens already."""
    sums = _Sums([], [], [], [])
    with Meter("reading flags", len(examples)) as meter:
        for start in range(0, len(examples), batch_size):
            part = slice(start, start + batch_size)
            batch = batch_of(model, flags, examples[part], encoded[part])
            reading = FlagReading(flags, batch, loss, gradients=False)
            with reading.reading(model):
                each = response_loss(model, batch)
            n = batch.answer.sum(dim=1)
            sums.cross_entropy.extend(float(row.double().sum()) for row in each.split(n.tolist()))
            sums.flag_loss.extend((reading.loss_by_row.double() * n).tolist())
            sums.tokens.extend(n.tolist())
            sums.strength.extend(reading.strength.tolist())
            meter.advance(len(n))
    labels = flags.labels([example.concepts for example in examples]).numpy() > 0.5
    reads = np.asarray(sums.strength) > READS_ON
    known = np.isfinite(balanced_accuracy(reads, labels))
    return FlagMeasures(
        examples=len(examples),
        tokens=sum(sums.tokens),
        cross_entropy=bootstrap_ratio_of_sums(sums.cross_entropy, sums.tokens, seed=seed),
        flag_loss=bootstrap_ratio_of_sums(sums.flag_loss, sums.tokens, seed=seed),
        accuracy=bootstrap_statistic(balanced_accuracy, [reads, labels], seed=seed) if known else None,
        concepts=tuple(
            ConceptAccuracy(concept=name, dims=dims, on=_share(reads[on, i]), off=_share(~reads[~on, i]))
            for i, (name, dims) in enumerate(zip(flags.concepts, flags.dims, strict=True))
            for on in [labels[:, i]]
        ),
    )


def balanced_accuracy(reads: NDArray[np.bool_], labels: NDArray[np.bool_]) -> float:
    """Mean over concepts of the mean of both classes' shares of right readings; NaN where no concept has both.

    Args:
        reads: `[N, C]` whether each flag reads on.
        labels: `[N, C]` whether it should.
    """
    right, on = reads == labels, labels.sum(axis=0)
    off = len(labels) - on
    both = (on > 0) & (off > 0)
    if not both.any():
        return float("nan")
    shares = (right & labels).sum(axis=0)[both] / on[both] + (right & ~labels).sum(axis=0)[both] / off[both]
    return float(shares.mean() / 2)


def strengths_right(strength: Float[Tensor, "B C"], labels: Float[Tensor, "B C"]) -> Float[Tensor, 4]:
    """Counts of right and all readings where flags should be on, and of both where off."""
    reads, on = strength > READS_ON, labels > 0.5
    return torch.stack([(reads & on).sum(), on.sum(), (~reads & ~on).sum(), (~on).sum()]).float()


def _share(right: NDArray[np.bool_]) -> Interval | None:
    return wilson_interval(int(right.sum()), len(right)) if len(right) else None
