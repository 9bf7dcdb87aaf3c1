"""A prefix processed once, whose last token can then be continued under many edits at the same time.

Only the layers above the site run again. They are the model's own layer modules, called with what the model itself
handed them for the last token (rotary embeddings, masks, positions), recorded in one forward pass, so that every layout
and every kind of layer (Gemma's local and global ones too) is followed without knowing it. The keys and values of the
earlier tokens are shared: edits are stacked as if they were later tokens of a few sequences, all at the last token's
position, and a mask lets each see the prefix and itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from trimtab.errors import UserError
from trimtab.lm import GrowingCache, LanguageModel, RowDelta, Site, TokenBatch, edited, site_width
from trimtab.lm.sites import HEAD_KINDS
from trimtab.lm.taps import tap

ROWS_PER_SEQUENCE = 32
"""Edits stacked in one sequence: enough to make attention a few large products, few enough to waste little on masked
pairs of edits."""


@dataclass
class _LayerCall:
    """One layer and the arguments it was called with for the prefix's last token."""

    module: nn.Module
    arguments: inspect.BoundArguments

    @property
    def mask(self) -> Tensor | None:
        return self.arguments.arguments.get("attention_mask")

    def run(self, hidden: Float[Tensor, "S R d"], mask: Tensor, cache: Cache) -> Tensor:
        values = self.arguments.arguments
        first = next(iter(values))
        replaced: dict[str, Any] = {first: hidden, "attention_mask": mask}
        for name, value in values.items():
            if isinstance(value, Cache):
                replaced[name] = cache
            elif isinstance(value, dict):  # **kwargs of the layer's forward
                replaced[name] = {key: cache if isinstance(item, Cache) else item for key, item in value.items()}
        call = inspect.BoundArguments(self.arguments.signature, {**values, **replaced})  # type: ignore[arg-type]
        output = self.module(*call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output


class _SharedLayer(CacheLayerMixin):
    """Keys and values of the prefix, `[1, heads, P, head_dim]`, put before those of any batch and never changed."""

    is_sliding = False

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return key_states, value_states
        rows = len(key_states)
        keys = torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=2)
        return keys, torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=2)

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class PrefixContinuation:
    """The state of a model after a prefix, from which edits of the last token are continued.

    Args:
        model: the model; nothing of it is changed.
        site: where the last token is edited, a residual site or a branch's output.
        ids: the prefix's token ids, at least one.

    Attributes:
        x: `[d]` the unedited activation at the site.
        logits: `[V]` the unedited next-token logits, as the model itself computes them, in float32.

    Raises:
        UserError: the site does not exist or is an attention head's, the prefix is empty or too long, or the layers
            cannot be called in this way.
    """

    def __init__(self, model: LanguageModel, site: Site | str, ids: Sequence[int]) -> None:
        self.model, self.site = model, model.site(site)
        if self.site.kind in HEAD_KINDS:
            raise UserError(f"site {self.site}", "features of attention heads cannot be scored", "use a residual site")
        _check_prefix(model, ids)
        self.n_tokens = len(ids)
        after = self.site.kind == "resid_post"
        self._first_layer = self.site.layer + after
        self._edit_inside = self.site.kind not in ("resid_pre", "resid_post")
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._record(ids)

    @torch.no_grad()
    def _record(self, ids: Sequence[int]) -> None:
        model, device = self.model, self.model.device
        cache = GrowingCache(model.n_layers, len(ids))
        head, last = torch.tensor([list(ids[:-1])], device=device), torch.tensor([[ids[-1]]], device=device)
        if len(ids) > 1:
            model.forward(TokenBatch.full(head), cache=cache, last=1)
        self._cache = Cache(layers=[_copy_layer(layer) for layer in cache.layers])
        seen: list[Tensor] = []
        calls: list[_LayerCall] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            signature = inspect.signature(module.forward)
            if "attention_mask" not in signature.parameters:
                raise UserError(
                    f"model {model.name}",
                    f"its layers ({type(module).__name__}) take no attention_mask, so that edits cannot share a prefix",
                    "use a decoder whose layers do, as Llama's, Gemma's or GPT-2's",
                )
            calls.append(_LayerCall(module, signature.bind(*args, **kwargs)))

        with ExitStack() as stack:
            for handle in tap(model, self.site, lambda x: seen.append(x[0, -1])):  # type: ignore[func-returns-value]
                stack.callback(handle.remove)
            for layer in model.layout.layers[self._first_layer :]:
                stack.callback(layer.module.register_forward_pre_hook(record, with_kwargs=True).remove)
            self.logits = model.forward(TokenBatch.full(last), cache=cache, last=1)[0, -1].float()
        self.x = seen[0].clone()
        self._calls = calls
        if self._edit_inside:
            arguments = calls[0].arguments.arguments
            self._start = next(iter(arguments.values()))[0, -1].clone()
        else:
            self._start = self.x

    @property
    def width(self) -> int:
        """Size of the activation at the site."""
        return site_width(self.model, self.site)

    @torch.no_grad()
    def last_hidden(self, delta: Float[Tensor, "B d"]) -> Float[Tensor, "B d"]:
        """The last layer's output at the last token, before the final norm, for each edit.

        Args:
            delta: what is added to the activation at the site, one row per edit, in model units.
        """
        count = len(delta)
        rows = min(ROWS_PER_SEQUENCE, count)
        sequences = -(-count // rows)
        delta = nn.functional.pad(delta.to(self.x.dtype), (0, 0, 0, sequences * rows - count))
        delta = delta.unflatten(0, (sequences, rows))
        with ExitStack() as stack:
            if self._edit_inside:
                batch = torch.arange(sequences, device=delta.device).repeat_interleave(rows)
                time = torch.arange(rows, device=delta.device).repeat(sequences)
                change = RowDelta(batch, time, delta.flatten(0, 1))
                stack.enter_context(edited(self.model, {self.site: lambda _x: change}))
                hidden = self._start.expand(sequences, rows, -1)
            else:
                hidden = self._start + delta
            for call in self._calls:
                hidden = call.run(hidden, self._mask(call.mask, rows), self._cache)
        return hidden.flatten(0, 1)[:count]

    def _mask(self, recorded: Tensor | None, rows: int) -> Tensor:
        """Additive mask `[1, 1, rows, P + rows]`: what the model masked in the prefix, and all edits but one's own."""
        key = (0 if recorded is None else id(recorded), rows)
        if key not in self._masks:
            past, low = self.n_tokens - 1, torch.finfo(self.x.dtype).min
            prefix = torch.zeros(1, 1, 1, past, dtype=self.x.dtype, device=self.x.device)
            if recorded is not None:
                seen = recorded[..., :past]
                prefix = torch.where(seen, prefix, low) if seen.dtype == torch.bool else seen.to(self.x.dtype)
            own = torch.full((rows, rows), low, dtype=self.x.dtype, device=self.x.device).fill_diagonal_(0)
            self._masks[key] = torch.cat([prefix.expand(1, 1, rows, past), own[None, None]], dim=-1)
        return self._masks[key]


def _copy_layer(layer: Any) -> _SharedLayer:
    if layer.keys is None:
        return _SharedLayer(None, None)
    return _SharedLayer(layer.keys.clone(), layer.values.clone())


def _check_prefix(model: LanguageModel, ids: Sequence[int]) -> None:
    if len(ids) == 0:
        raise UserError("the prefix", "it is empty: there is no token to edit", "give at least one token")
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    if limit and len(ids) > limit:
        raise UserError("the prefix", f"it has {len(ids)} tokens, {model.name} takes {limit}", "shorten it")
