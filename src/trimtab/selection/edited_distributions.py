"""Next-token distributions under edits, a block of rows at a time, and what can be asked of them.

Every quantity costs one pass over the block at most; what several criteria need (the largest logit, the normaliser) is
computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.lm.token_statistics import kl_divergence, token_statistics

CACHE_BYTES = 1 << 20
"""On a CPU, elementwise passes run over pieces of about this size, so that they stay in a core's own cache."""


class BaseDistribution:
    """The next-token distribution after the prefix, nothing edited.

    Args:
        logits: `[V]`.
    """

    def __init__(self, logits: Float[Tensor, " V"]) -> None:
        self.logits = logits.float()
        self.log_probs: Float[Tensor, " V"] = self.logits.log_softmax(-1)
        self.probs: Float[Tensor, " V"] = self.log_probs.exp()

    @cached_property
    def entropy(self) -> Float[Tensor, ""]:
        """−Σ_v p_v log p_v, in nats."""
        return _entropies(self.logits[None])[0]


class EditedDistributions:
    """Next-token distributions of R edits.

    Args:
        logits: `[R, V]` float32.
        rows: `[R]` which of the edits given to the scorer these are.
        base: the unedited distribution.
    """

    def __init__(self, logits: Float[Tensor, "R V"], rows: Int[Tensor, " R"], base: BaseDistribution) -> None:
        self.logits, self.rows, self.base = logits, rows, base

    @cached_property
    def _softmax(self) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        """The largest logit and log Σ_v exp(logit_v), while a piece is at hand."""
        largest, normaliser = self.logits.new_empty(2, len(self.logits))
        for part in self._pieces():
            torch.amax(self.logits[part], -1, out=largest[part])
            shifted = (self.logits[part] - largest[part, None]).exp_()
            torch.add(largest[part], shifted.sum(-1).log_(), out=normaliser[part])
        return largest, normaliser

    @property
    def largest(self) -> Float[Tensor, " R"]:
        """The largest logit."""
        return self._softmax[0]

    @property
    def normaliser(self) -> Float[Tensor, " R"]:
        """log Σ_v exp(logit_v)."""
        return self._softmax[1]

    def mean_top_log_prob(self, k: int) -> Float[Tensor, " R"]:
        """Mean log-probability of the k most likely tokens."""
        top = self.largest if k == 1 else self.logits.topk(k, dim=-1).values.mean(-1)
        return top - self.normaliser

    def log_prob(self, tokens: Int[Tensor, "R M"]) -> Float[Tensor, "R M"]:
        """Log-probability of given tokens, per row."""
        return self.logits.gather(-1, tokens) - self.normaliser[:, None]

    def rank(self, tokens: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """How many tokens are more likely than a given one, per row: 0 for the most likely."""
        own = self.logits.gather(-1, tokens[:, None])
        above = [
            torch.gt(piece, own[part], out=torch.empty_like(piece)).sum(-1)  # as floats: adding up booleans is slow
            for part in self._pieces()
            for piece in (self.logits[part],)
        ]
        return torch.cat(above).long()

    @property
    def entropy(self) -> Float[Tensor, " R"]:
        """−Σ_v p_v log p_v, in nats."""
        return _entropies(self.logits)

    def top_tokens(self, count: int) -> Int[Tensor, "R count"]:
        """The most likely tokens, most likely first."""
        return self.logits.topk(count, dim=-1).indices

    def kl(self, direction: Literal["steered-base", "base-steered"] = "steered-base") -> Float[Tensor, " R"]:
        """KL(steered ‖ base) or KL(base ‖ steered), in nats."""
        base = self.base
        if direction == "base-steered":
            cross = self.normaliser - torch.mv(self.logits, base.probs)
            return (cross + torch.dot(base.probs, base.log_probs)).clamp_min(0)
        return kl_divergence(self.logits, base.logits[None])

    def _pieces(self) -> Iterator[slice]:
        rows, vocab = self.logits.shape
        size = rows if self.logits.device.type != "cpu" else max(1, CACHE_BYTES // (4 * vocab))
        return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _entropies(logits: Float[Tensor, "R V"]) -> Float[Tensor, " R"]:
    any_token = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return token_statistics(logits, any_token)[1]


Reducer = Callable[[EditedDistributions], Tensor]
"""What a criterion wants of every edit: a function from a block of R distributions to `[R, ...]`."""
