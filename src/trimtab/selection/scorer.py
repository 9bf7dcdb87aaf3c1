"""The last-token scorer that criteria share: the next-token distribution under each of thousands of edits.

The prefix's keys and values are computed once. Each edit is one row: the last token's activation at the site plus
c_i · v̂_i goes through the layers above the site, the final norm and the head; the layers below are never run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import LanguageModel, RowDelta, Site
from trimtab.lm.unembedding import Unembedding
from trimtab.selection.edited_distributions import BaseDistribution, EditedDistributions, Reducer
from trimtab.selection.prefix import PrefixContinuation

BATCH_SIZE = 1024


class LastTokenScorer:
    """Scores edits of a prefix's last token at one site.

    Args:
        model: the model; it is left as it was.
        site: where the last token is edited: a residual site or a branch's output (`attn_out`, `mlp_out`).
        ids: the prefix's token ids.
        batch_size: edits that go through the layers together.
        block_bytes: size of a block of logits; see `Unembedding`.
        past: edits of the tokens before the last, as `edited` takes them.

    Raises:
        UserError: the site does not exist or is an attention head's, the prefix is empty or too long, the batch is
            empty, or the model's logits are not final norm and head of its residual.
    """

    def __init__(
        self,
        model: LanguageModel,
        site: Site | str,
        ids: Sequence[int],
        *,
        batch_size: int = BATCH_SIZE,
        block_bytes: int | None = None,
        past: Mapping[Site, Callable[[Tensor], RowDelta | None]] | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}", "it must be at least 1", "raise it")
        self.model, self.batch_size = model, batch_size
        self.continuation = PrefixContinuation(model, site, ids, past)
        self.unembedding = Unembedding(model, block_bytes)
        self.site = self.continuation.site
        self.base = BaseDistribution(self.continuation.logits)
        self.unembedding.check(self.continuation.hidden, self.continuation.logits)

    @torch.no_grad()
    def logits(self, delta: Float[Tensor, "B d"]) -> Float[Tensor, "B V"]:
        """Next-token logits under each edit, in float32. For a few edits: all of [B, V] is kept."""
        return self.unembedding.logits(self.continuation.last_hidden(delta))

    @torch.enable_grad()
    def gradient(self, quantity: Callable[[Tensor], Tensor]) -> Float[Tensor, " d"]:
        """The gradient of a quantity of the unedited next-token distribution in the activation at the site.

        Args:
            quantity: a differentiable function from log-probabilities `[V]` to a scalar.
        """
        delta = self.continuation.x.new_zeros(1, self.continuation.width).requires_grad_()
        log_probs = self.unembedding.logits(self.continuation.last_hidden(delta))[0].log_softmax(-1)
        return torch.autograd.grad(quantity(log_probs), delta)[0][0].float()

    @torch.no_grad()
    def score(
        self,
        directions: Float[Tensor, "n d"],
        coefficients: Float[Tensor, " n"],
        reducers: Mapping[str, Reducer],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Tensor]:
        """Reduce the next-token distribution under every edit.

        Args:
            directions: unit directions v̂, one row per edit.
            coefficients: c, in model units: the edit adds c_i · v̂_i.
            reducers: named functions of a block of distributions; all are served by the same pass.
            progress: called with the number of edits whenever some are done.

        Returns:
            Per reducer its values `[n, ...]`, in the order of the edits.

        Raises:
            UserError: the directions have another width than the site.
        """
        if directions.shape[-1] != self.continuation.width:
            raise UserError(
                f"directions of width {directions.shape[-1]}",
                f"site {self.site} of {self.model.name} has width {self.continuation.width}",
                "give directions of that width",
            )
        device = self.model.device
        found: dict[str, list[Tensor]] = {name: [] for name in reducers}
        for start in range(0, len(directions), self.batch_size):
            part = slice(start, start + self.batch_size)
            delta = directions[part].to(device) * coefficients[part, None].to(device)
            hidden = self.continuation.last_hidden(delta)
            for rows in self.unembedding.blocks(hidden):
                index = start + rows.start + torch.arange(len(rows.logits), device=device)
                block = EditedDistributions(rows.logits, index, self.base)
                for name, reduce in reducers.items():
                    found[name].append(reduce(block))
            if progress is not None:
                progress(len(delta))
        return {name: torch.cat(parts) if parts else torch.empty(0) for name, parts in found.items()}
