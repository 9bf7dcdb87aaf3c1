"""Read texts with the unedited model: does a feature fire in them, and are they still ordinary text?

What a steered model wrote says little while the steering is still applied: the added direction would be found again
whether or not it did anything. So prompt and continuation go through the model once more, with no edit anywhere, and
only the continuation's tokens are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.lm import LanguageModel, Site, TokenBatch, capture, edited
from trimtab.steering.fluency import repetition


class Readback(NamedTuple):
    """What the unedited model makes of N continuations of T tokens."""

    fired: Bool[ndarray, "N T"]
    """Whether each text's own feature fires at each token."""
    counts: Int[ndarray, "N n"]
    """Tokens of each text at which each feature of the dictionary fires."""
    nll: Float[ndarray, " N"]
    """Mean negative log-likelihood of the continuation, in nats per token."""
    repetition: Float[ndarray, " N"]
    """Share of 4-grams that occurred before in the same continuation."""


@torch.no_grad()
def read_back(
    model: LanguageModel,
    dictionary: Dictionary,
    site: Site,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    features: Sequence[int],
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Readback:
    """Read continuations of equal length with the unedited model.

    Args:
        site: where the dictionary reads.
        prompts: token ids, one list per text.
        continuations: token ids, T for every text.
        features: each text's own feature; -1 for none.
        batch_size: texts per forward pass.
        progress: called with the number of texts done.
    """
    length = len(continuations[0])
    assert all(len(tokens) == length for tokens in continuations)
    fired = np.zeros((len(prompts), length), dtype=bool)
    counts = np.zeros((len(prompts), dictionary.n_features), dtype=np.int16)
    nll = np.zeros(len(prompts))
    # Texts of similar length share a batch, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        texts = [[*prompts[i], *continuations[i]] for i in members]
        batch = TokenBatch.pad(texts, model.pad_id, model.device)
        seen: list[Tensor] = []
        with edited(model, {site: lambda x, seen=seen: seen.append(x)}):  # looks, changes nothing
            logits = model.forward(batch, last=length + 1)[:, :-1]
        target = batch.ids[:, -length:, None]
        log_p = logits.gather(-1, target)[..., 0].float() - torch.logsumexp(logits.float(), dim=-1)
        active = dictionary.encode(seen[0][:, -length:].flatten(2).float()) > 0
        own = torch.tensor([features[i] for i in members], device=active.device)
        mine = active.gather(2, own.clamp_min(0)[:, None, None].expand(-1, length, 1))[..., 0]
        fired[members] = (mine & (own >= 0)[:, None]).cpu().numpy()
        counts[members] = active.sum(dim=1).cpu().numpy()
        nll[members] = -log_p.mean(dim=-1).cpu().numpy()
        if progress:
            progress(len(members))
    return Readback(fired, counts, nll, np.array([repetition(tokens) for tokens in continuations]))


@torch.no_grad()
def most_active(
    model: LanguageModel, dictionary: Dictionary, site: Site, prompts: Sequence[Sequence[int]]
) -> list[int]:
    """The feature that moves the reconstruction of each prompt's residuals most at any one token.

    Position 0 is left out, an attention sink in most models; a prompt of one token is read there all the same.
    """
    found = []
    for prompt in prompts:
        x = capture(model, TokenBatch.pad([prompt], device=model.device), [site])[site].flatten(2)[0]
        strength = dictionary.encode(x[min(1, len(x) - 1) :].float()) * dictionary.decoder_norms
        found.append(int(strength.amax(dim=0).argmax()))
    return found
