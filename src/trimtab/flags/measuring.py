"""What a model's flags say of held-out responses, and how well the model predicts them, with nothing forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from trimtab.flags.dividing import example_id, group_id
from trimtab.flags.examples import Example, batch_of, encode
from trimtab.flags.loss import FlagReading, response_sums
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.runs import Meter
from trimtab.stats import Interval, Resampled, Resamples, wilson_interval
from trimtab.stats.resamples import balanced, column_mean, ratio
from trimtab.stats.samples import FloatArray

READS_ON = 0.5
"""Strength above which a flag reads on."""
LEAST_UNITS = 20
"""With fewer different documents and prompts, examples are resampled."""
Unit = Literal["document", "prompt", "example"]


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
    """Measured on examples, nothing forced; intervals as `units_of` says, those of concepts Wilson's over examples."""

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


def units_of(examples: Sequence[Example]) -> tuple[Unit, list[str]]:
    """What intervals over examples resample: their documents, or prompts where none is a passage of a document, or the
    examples themselves where fewer than 20 of these differ; and the unit of each example."""
    groups = [group_id(example) for example in examples]
    if len(set(groups)) < LEAST_UNITS:
        return "example", [example_id(example) for example in examples]
    return "prompt" if all(example.unit is None for example in examples) else "document", groups


@torch.no_grad()
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
    encoded = encode(model, examples, chat=chat, max_tokens=max_tokens)
    n, nats, losses = np.zeros(len(examples)), np.zeros(len(examples)), np.zeros(len(examples))
    strength = np.zeros((len(examples), len(flags.concepts)))
    with Meter("reading flags", len(examples)) as meter:
        for start in range(0, len(examples), batch_size):
            part = slice(start, start + batch_size)
            batch = batch_of(model, flags, examples[part], encoded[part])
            reading = FlagReading(flags, batch, loss, gradients=False)
            with reading.reading(model):
                nats[part] = response_sums(model, batch).cpu()
            n[part] = batch.answer.sum(dim=1).cpu()
            losses[part] = reading.loss_by_row.double().cpu().numpy() * n[part]
            strength[part] = reading.strength.cpu()
            meter.advance(len(batch.answer))
    labels, reads = flags.labels([example.concepts for example in examples]).numpy() > 0.5, strength > READS_ON
    resamples = Resamples(units_of(examples)[1], seed=seed)
    accuracy = mean_accuracy(reads, labels, resamples)

    def per_token(sums: ArrayLike) -> Interval:
        return resamples.of(partial(ratio, sums, n)).interval

    return FlagMeasures(
        examples=len(examples),
        tokens=int(n.sum()),
        cross_entropy=per_token(nats),
        flag_loss=per_token(losses),
        accuracy=accuracy.interval if np.isfinite(accuracy.estimate) else None,
        concepts=tuple(
            ConceptAccuracy(concept=name, dims=dims, on=_share(reads[on, i]), off=_share(~reads[~on, i]))
            for i, (name, dims) in enumerate(zip(flags.concepts, flags.dims, strict=True))
            for on in [labels[:, i]]
        ),
    )


def mean_accuracy(
    reads: Bool[np.ndarray, "N C"], labels: Bool[NDArray[np.bool_], "N C"], resamples: Resamples
) -> Resampled:
    """Mean over concepts of the mean of both kinds' shares of right readings; NaN where no concept has both kinds.

    Args:
        reads: whether each flag reads on.
        labels: whether it should.
        resamples: of the examples.
    """

    def shares(weights: FloatArray) -> FloatArray:
        pairs = zip(reads.T, labels.T, strict=True)
        return column_mean(np.stack([balanced(said, yes, weights) for said, yes in pairs], axis=-1))

    return resamples.of(shares)


def strengths_right(strength: Float[Tensor, "B C"], labels: Float[Tensor, "B C"]) -> Float[Tensor, 4]:
    """Counts of right and all readings where flags should be on, and of both where off."""
    reads, on = strength > READS_ON, labels > 0.5
    return torch.stack([(reads & on).sum(), on.sum(), (~reads & ~on).sum(), (~on).sum()]).float()


def _share(right: NDArray[np.bool_]) -> Interval | None:
    return wilson_interval(int(right.sum()), len(right)) if len(right) else None
