"""A prefix processed once, whose last token can then be continued under many edits at the same time.

Only the layers from the first edited one up run again. Edits are stacked as copies of the last token, side by side in a
few sequences that share the earlier tokens' keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.lm import LanguageModel, RowDelta, Site, TokenBatch, capture, edited, not_finite_error, site_width
from trimtab.lm.sites import HEAD_KINDS
from trimtab.lm.upper_layers import can_run_from, first_edited_layer, input_site, side_by_side, starting_at

ROWS_PER_SEQUENCE = 32
"""Edits stacked in one sequence: enough to make attention a few large products, few enough to waste little on masked
pairs of edits."""


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
        self._rows = ROWS_PER_SEQUENCE if not of_head and can_run_from(model, self._layer, "copies") else 1
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

    def last_hidden(self, delta: Float[Tensor, "B d"]) -> Float[Tensor, "B d"]:
        """The last layer's output at the last token, before the final norm, for each edit; gradients, where they are
        on, reach the edits.

        Args:
            delta: what is added to the activation at the site, one row per edit, in model units.
        """
        count = len(delta)
        rows = min(self._rows, count)
        sequences = -(-count // rows)
        place = torch.arange(sequences * rows, device=delta.device)
        delta = nn.functional.pad(delta.to(self.x.dtype), (0, 0, 0, len(place) - count))
        change = RowDelta(place // rows, place % rows, delta)
        batch = TokenBatch.full(self._last.expand(sequences, 1))
        with ExitStack() as stack:
            stack.enter_context(starting_at(self.model, self._layer, self._input.expand(sequences, -1, -1)))
            if rows > 1:
                stack.enter_context(side_by_side(self.model, self._layer, rows, self._cache.length))
            stack.enter_context(edited(self.model, {self.site: lambda _x: change}))
            hidden = capture(self.model, batch, [self._end], cache=self._cache, gradients=True)[self._end]
        return hidden.flatten(0, 1)[:count]


def _check_prefix(model: LanguageModel, ids: Sequence[int]) -> None:
    if len(ids) == 0:
        raise UserError("the prefix", "it is empty: there is no token to edit", "give at least one token")
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    if limit and len(ids) > limit:
        raise UserError("the prefix", f"it has {len(ids)} tokens, {model.name} takes {limit}", "shorten it")
