"""What steers without flags, fitted on labelled examples in the original model: mean differences, and SAE features.

Activations are means over a response's tokens. A concept's direction is the mean of examples that need it minus the
mean of the others. Features to try are those whose largest activation in a response goes most with the label
(Pearson's correlation, as CorrSteer has it with correctness).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.flags.examples import Example, batch_of, encode
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, Site, capture


class Fitted(NamedTuple):
    """By concept."""

    directions: dict[str, dict[Site, Float[Tensor, " d"]]]
    features: dict[str, list[int]]
    """Most promising first; empty without a dictionary."""


@torch.no_grad()
def fit_controls(
    model: LanguageModel,
    flags: FlagSpec,
    examples: Sequence[Example],
    sites: Sequence[Site],
    dictionary: Dictionary | None = None,
    *,
    features: int = 8,
    chat: bool = False,
    max_tokens: int = 256,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Fitted:
    """Fit directions of all concepts, and choose features to try, in one pass over the examples.

    Args:
        model: the original one.
        flags: give the concepts.
        examples: with their labels; each concept has both kinds.
        sites: where directions are fitted.
        dictionary: of one site, whose features are looked at there.
        features: how many of them to name for each concept.
        chat, max_tokens: as in `FlagTraining`.
        batch_size: examples of a forward pass.
        progress: told of the examples done.
    """
    read_at = None if dictionary is None else model.site(dictionary.info.site)
    wanted = [*sites, *([] if read_at is None or read_at in sites else [read_at])]
    encoded = encode(model, examples, chat=chat, max_tokens=max_tokens)
    means: dict[Site, list[Tensor]] = {site: [] for site in sites}
    largest: list[Tensor] = []
    order = sorted(range(len(examples)), key=lambda i: len(encoded[i].ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = batch_of(model, flags, [examples[i] for i in rows], [encoded[i] for i in rows])
        seen = capture(model, batch.tokens, wanted)
        share = batch.answer / batch.answer.sum(dim=1, keepdim=True)
        for site in sites:
            means[site].append(torch.einsum("btd,bt->bd", seen[site].float(), share).cpu())
        if dictionary is not None and read_at is not None:
            for x, answer in zip(seen[read_at], batch.answer, strict=True):
                largest.append(dictionary.encode(x[answer]).amax(dim=0).float().cpu())
        if progress:
            progress(len(rows))
    labels = flags.labels([examples[i].concepts for i in order]) > 0.5
    rows_at = {site: torch.cat(found) for site, found in means.items()}
    codes = torch.stack(largest) if largest else None
    return Fitted(
        directions={
            concept: {site: x[has].mean(dim=0) - x[~has].mean(dim=0) for site, x in rows_at.items()}
            for concept, has in zip(flags.concepts, labels.T, strict=True)
        },
        features={
            concept: [] if codes is None else correlated(codes, has)[:features].tolist()
            for concept, has in zip(flags.concepts, labels.T, strict=True)
        },
    )


def correlated(codes: Float[Tensor, "N n"], has: Bool[Tensor, " N"]) -> Tensor:
    """Features by their correlation with a label, the highest first; those that never vary come last."""
    x, y = codes.double() - codes.double().mean(dim=0), has.double() - has.double().mean()
    spread = x.square().sum(dim=0)
    found = torch.where(spread > 1e-12, y @ x / spread.clamp_min(1e-12).sqrt(), -torch.inf)
    return found.argsort(descending=True, stable=True)
