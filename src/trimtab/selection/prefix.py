"""A prefix processed once, whose last token can then be continued under many edits at the same time.

Only the layers from the first edited one up run again. Edits are stacked as copies of the last token, side by side in a
few sequences that share the earlier tokens' keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.lm import LanguageModel, RowDelta, Site, TokenBatch, capture, edited, not_finite_error, site_width
from trimtab.lm.captured import Captured
from trimtab.lm.sites import HEAD_KINDS
from trimtab.lm.upper_layers import can_run_from, first_edited_layer, input_site, side_by_side, starting_at

ROWS_PER_SEQUENCE = 32
"""Edits stacked in one sequence: enough to make attention a few large products, few enough to waste little on masked
pairs of edits."""


PAYS = 8
"""Passes to come from which on one is captured, which takes as long as several."""


class _Stack:
    """So many edits at fixed addresses, and the pass that they go through together.

    Args:
        continuation: of the prefix.
        count: edits.
    """

    def __init__(self, continuation: PrefixContinuation, count: int) -> None:
        model, x = continuation.model, continuation.x
        self.count, self.rows = count, min(continuation.rows, count)
        self.sequences = -(-count // self.rows)
        place = torch.arange(self.sequences * self.rows, device=x.device)
        self.batch, self.time = place // self.rows, place % self.rows
        self.delta = x.new_zeros(len(place), continuation.width)
        self.captured = Captured(model.device, f"scoring with {model.name} at {continuation.site}")


class PrefixContinuation:
    """The state of a model after a prefix, from which edits of the last token are continued.

    Args:
        model: the model; nothing of it is changed.
        site: where the last token is edited: a residual site, a branch's output, or what one attention head reads or
            gives.
        ids: the prefix's token ids, at least one.
        past: edits of the tokens before the last, as `edited` takes them.

    Attributes:
        x: `[d]` the unedited activation at the site.
        hidden: `[d]` the last layer's unedited output, before the final norm.
        logits: `[V]` the unedited next-token logits, as the model itself computes them, in float32.
        rows: edits that are stacked in one sequence.

    Raises:
        UserError: the site does not exist or is that of all heads, the prefix is empty or too long, or the logits
            after it are not finite.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        site: Site | str,
        ids: Sequence[int],
        past: Mapping[Site, Callable[[Tensor], RowDelta | None]] | None = None,
    ) -> None:
        self.model, self.site = model, model.site(site)
        of_head = self.site.kind in HEAD_KINDS
        if of_head and self.site.head is None:
            hint = f"name a head, like {self.site}.0"
            raise UserError(f"site {self.site}", "features of all heads at once cannot be scored", hint)
        _check_prefix(model, ids)
        self._layer, self._end = first_edited_layer([self.site]), input_site(model.n_layers)
        self.rows = ROWS_PER_SEQUENCE if not of_head and can_run_from(model, self._layer, "copies") else 1
        self._stack: _Stack | None = None
        tokens = torch.tensor([list(ids)], device=model.device)
        cache = model.new_cache(len(ids) - 1)
        if len(ids) > 1:
            with edited(model, past or {}):
                model.forward(TokenBatch.full(tokens[:, :-1]), cache=cache, last=1)
        self._cache, self._last = cache.frozen(), tokens[:, -1:]
        last, start = TokenBatch.full(self._last), input_site(self._layer)
        found = capture(model, last, [start, self.site, self._end], cache=self._cache)
        self._input, self.x, self.hidden = found[start], found[self.site][0, -1], found[self._end][0, -1]
        self.logits = model.forward(last, cache=self._cache, last=1)[0, -1].float()
        if not bool(self.logits.logsumexp(-1).isfinite()):
            raise not_finite_error(model, ids, edited_before=bool(past))

    @property
    def width(self) -> int:
        """Size of the activation at the site."""
        return site_width(self.model, self.site)

    def last_hidden(self, delta: Float[Tensor, "B d"], to_come: int = PAYS) -> Float[Tensor, "B d"]:
        """The last layer's output at the last token, before the final norm, for each edit; gradients, where they are
        on, reach the edits.

        Args:
            delta: what is added to the activation at the site, one row per edit, in model units.
            to_come: how often as many edits are asked for from here on; a GPU captures what is worth it.
        """
        if self._stack is None or self._stack.count != len(delta):
            self._stack = _Stack(self, len(delta))
        stack = self._stack
        if torch.is_grad_enabled() and delta.requires_grad:
            whole = nn.functional.pad(delta.to(self.x.dtype), (0, 0, 0, len(stack.delta) - stack.count))
            return self._hidden(stack, whole)
        stack.delta[: stack.count] = delta
        pays = stack.captured.is_captured or to_come >= PAYS
        replay = pays and stack.captured.may_replay(self.model.hf)
        hidden = stack.captured(partial(self._hidden, stack, stack.delta), replay=replay)
        assert hidden is not None
        return hidden

    def forget_shapes(self) -> None:
        """Free what is kept for further edits of as many rows as before."""
        self._stack = None

    def _hidden(self, stack: _Stack, delta: Float[Tensor, "S d"]) -> Float[Tensor, "B d"]:
        change = RowDelta(stack.batch, stack.time, delta)
        batch = TokenBatch.full(self._last.expand(stack.sequences, 1))
        with ExitStack() as contexts:
            contexts.enter_context(starting_at(self.model, self._layer, self._input.expand(stack.sequences, -1, -1)))
            if stack.rows > 1:
                contexts.enter_context(side_by_side(self.model, self._layer, stack.rows, self._cache.length))
            contexts.enter_context(edited(self.model, {self.site: lambda _x: change}))
            hidden = capture(self.model, batch, [self._end], cache=self._cache, gradients=True)[self._end]
        return hidden.flatten(0, 1)[: stack.count]


def _check_prefix(model: LanguageModel, ids: Sequence[int]) -> None:
    if len(ids) == 0:
        raise UserError("the prefix", "it is empty: there is no token to edit", "give at least one token")
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    if limit and len(ids) > limit:
        raise UserError("the prefix", f"it has {len(ids)} tokens, {model.name} takes {limit}", "shorten it")
