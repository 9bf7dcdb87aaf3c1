"""What steers without flags, fitted on labelled examples in the original model: mean differences, and SAE features.

Activations are means over a response's tokens. A concept's direction is the mean of examples that need it minus the
mean of the others. Features to try are those whose largest activation in a response goes most with the label, as
CorrSteer has it with correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.control.arms.corrsteer import Correlations
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
    order = sorted(range(len(examples)), key=lambda i: len(encoded[i].ids))
    labels = flags.labels([examples[i].concepts for i in order]).double()
    means: dict[Site, list[Tensor]] = {site: [] for site in sites}
    sums = [] if dictionary is None else [Correlations(dictionary.n_features) for _ in flags.concepts]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = batch_of(model, flags, [examples[i] for i in rows], [encoded[i] for i in rows])
        seen = capture(model, batch.tokens, wanted)
        share = batch.answer / batch.answer.sum(dim=1, keepdim=True)
        for site in sites:
            means[site].append(torch.einsum("btd,bt->bd", seen[site].float(), share).cpu())
        if dictionary is not None and read_at is not None:
            answers = [x[answer] for x, answer in zip(seen[read_at], batch.answer, strict=True)]
            codes = [dictionary.in_model_units(dictionary.encode(x), x) for x in answers]
            largest = torch.stack([f.amax(dim=0) for f in codes]).double().cpu()
            for one, has in zip(sums, labels[start : start + batch_size].T, strict=True):
                one.see(largest, has)
        if progress:
            progress(len(rows))
    x_at = {site: torch.cat(found) for site, found in means.items()}
    chosen = {
        concept: one.values(has).argsort(descending=True, stable=True)[:features].tolist()
        for concept, one, has in zip(flags.concepts, sums, labels.T, strict=False)
    }
    return Fitted(
        directions={
            concept: {site: x[has].mean(dim=0) - x[~has].mean(dim=0) for site, x in x_at.items()}
            for concept, has in zip(flags.concepts, (labels > 0.5).T, strict=True)
        },
        features={concept: chosen.get(concept, []) for concept in flags.concepts},
    )
