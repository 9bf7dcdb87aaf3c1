"""The last-token scorer that criteria share: the next-token distribution under each of thousands of edits.

The prefix's keys and values are computed once. Each edit is one row: the last token's activation at the site plus
c_i · v̂_i goes through the layers above the site, the final norm and the head; the layers below are never run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import LanguageModel, RowDelta, Site
from trimtab.lm.transfers import to_device
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
        batch_size: edits that go through the layers together, at most: half as many where they do not fit in memory.
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
            progress: called with the number of edits whenever some are done; on a card, whenever it has been asked for
                some.

        Returns:
            Per reducer its values `[n, ...]`, in the order of the edits.

        Raises:
            UserError: the directions have another width than the site, or there is no memory for one edit.
        """
        if directions.shape[-1] != self.continuation.width:
            raise UserError(
                f"directions of width {directions.shape[-1]}",
                f"site {self.site} of {self.model.name} has width {self.continuation.width}",
                "give directions of that width",
            )
        coefficients = to_device(coefficients, self.model.device)
        found: dict[str, list[Tensor]] = {name: [] for name in reducers}
        start, tried = 0, self.batch_size
        while start < len(directions):
            part = slice(start, start + self.batch_size)
            try:
                to_come = (len(directions) - start) // self.batch_size
                parts = self._reduced(start, directions[part], coefficients[part], reducers, to_come)
            except torch.OutOfMemoryError:
                parts = None  # what was computed is held as long as the error is
            if parts is None:
                self._halve(min(self.batch_size, len(directions) - start))
                continue
            if self.batch_size < tried:
                why = f"{tried:,} edits at once do not fit in the memory of {self.model.device}"
                print(f"trimtab: note: {why}; going on with {self.batch_size:,}", file=sys.stderr, flush=True)
                tried = self.batch_size
            for name, values in parts.items():
                found[name] += values
            count = min(self.batch_size, len(directions) - start)
            start += count
            if progress is not None:
                progress(count)
        return {name: torch.cat(parts) if parts else torch.empty(0) for name, parts in found.items()}

    def _reduced(
        self, start: int, directions: Float[Tensor, "B d"], coefficients: Float[Tensor, " B"],
        reducers: Mapping[str, Reducer], to_come: int,
    ) -> dict[str, list[Tensor]]:  # fmt: skip
        """What reducers give of some edits, from number `start` on, block by block; the device is asked for nothing."""
        device = self.model.device
        found: dict[str, list[Tensor]] = {name: [] for name in reducers}
        hidden = self.continuation.last_hidden(to_device(directions, device) * coefficients[:, None], to_come)
        for rows in self.unembedding.blocks(hidden):
            index = start + rows.start + torch.arange(len(rows.logits), device=device)
            block = EditedDistributions(rows.logits, index, self.base)
            for name, reduce in reducers.items():
                found[name].append(reduce(block))
        return found

    def _halve(self, count: int) -> None:
        """Go on with half as many edits at once as there was no memory for."""
        self.continuation.forget_shapes()
        self.unembedding.free()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if count == 1:
            what, device = f"scoring at {self.site} of {self.model.name}", self.model.device
            hint = "free memory there, load the model in bfloat16 (--dtype bfloat16), or use another device"
            raise UserError(what, f"one edit does not fit in the memory of {device}", hint)
        self.batch_size = -(-count // 2)
