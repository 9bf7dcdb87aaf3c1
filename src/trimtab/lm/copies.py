"""Copies of a prompt in one forward pass: one token up to the first edited layer, from there one token for each copy.

What lies below the first edit is the same for all copies, so that it is computed once per prompt. From that layer on
the copies stand side by side as tokens at one position: each sees the keys and values that all of them share, and its
own, so that nothing of the cache is repeated for the pass.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.lm.batch import TokenBatch
from trimtab.lm.model import LanguageModel
from trimtab.lm.sites import Site, site_order
from trimtab.lm.taps import RowDelta, tap

MOST_COPIES = 1024
"""More are not put side by side: what each may see of the others grows with their number's square."""

_unfolds: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[int, str], bool]] = weakref.WeakKeyDictionary()
"""Whether copies may part at a layer of a model under an attention implementation, as far as it has been tried."""


def first_edited_layer(sites: Sequence[Site]) -> int:
    """The first layer whose input may differ between rows that are edited differently at these sites."""
    first = min(sites, key=site_order)
    return first.layer + (first.kind == "resid_post")


@contextmanager
def unfolded(model: LanguageModel, layer: int, copies: int, past: int) -> Iterator[None]:
    """Forward passes of one token per row go on with several copies of it from a layer's input on.

    Activations there are `[B, copies, …]`, and so are the logits if as many of the last positions are asked for; GPT-2
    gives the same values as `[B · copies, 1, …]`. Hooks on the layer below that were there before see copies as well.

    Args:
        model: one that `can_unfold`.
        layer: the number of layers for copies of what the last one gives.
        copies: of each row.
        past: tokens in the cache, padding included.
    """
    masks = _Masks(copies, past)
    layers = [found.module for found in model.layout.layers]
    with ExitStack() as stack:
        # Before all other hooks: edits must find the copies.
        if layer:
            handle = layers[layer - 1].register_forward_hook(lambda _m, _a, out: _repeated(out, copies), prepend=True)
        else:

            def repeat(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if args:
                    return (_repeated(args[0], copies), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": _repeated(kwargs["hidden_states"], copies)}

            handle = layers[0].register_forward_pre_hook(repeat, with_kwargs=True, prepend=True)
        stack.callback(handle.remove)
        for module in layers[layer:]:
            stack.callback(module.register_forward_pre_hook(masks.widen, with_kwargs=True).remove)
        yield


def can_unfold(model: LanguageModel, layer: int) -> bool:
    """Whether `unfolded` gives what rows of their own give, tried once per model and layer on a few tokens.

    Raises:
        MemoryError, torch.OutOfMemoryError: they pass, and say nothing about the layer.
    """
    attention = getattr(model.hf.config.get_text_config(), "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return False  # others do not take a mask of our own
    known = _unfolds.setdefault(model.hf, {})
    tried = (layer, attention)
    if tried not in known:
        try:
            known[tried] = _agrees(model, layer)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a foreign layer says to inputs of another shape: it cannot be done there
            known[tried] = False
    return known[tried]


def _repeated(output: Any, copies: int) -> Any:
    if isinstance(output, tuple):
        return (_repeated(output[0], copies), *output[1:])
    return output.expand(-1, copies, -1).contiguous()


class _Masks:
    """Attention masks of one token per row, made into those of its copies."""

    def __init__(self, copies: int, past: int) -> None:
        self.copies, self.past = copies, past
        self._made: list[tuple[Tensor | None, Tensor]] = []
        self._places: dict[type[nn.Module], int] = {}

    def widen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "attention_mask" in kwargs:
            mask = kwargs["attention_mask"]
            return args, {**kwargs, "attention_mask": self._wide(mask, module)}
        place = self._places.get(type(module))
        if place is None:
            place = list(inspect.signature(module.forward).parameters).index("attention_mask")
            self._places[type(module)] = place
        return (*args[:place], self._wide(args[place], module), *args[place + 1 :]), kwargs

    def _wide(self, mask: Tensor | None, module: nn.Module) -> Tensor:
        for given, wide in self._made:
            if given is mask:
                return wide
        found = mask
        if found is None:  # everything is seen
            device = next(module.parameters()).device
            found = torch.ones(1, 1, 1, self.past + 1, dtype=torch.bool, device=device)
        assert found.ndim == 4
        unseen = False if found.dtype == torch.bool else torch.finfo(found.dtype).min
        own = torch.eye(self.copies, dtype=torch.bool, device=found.device)
        own = torch.where(own, found[..., self.past :], unseen)
        shared = found[..., : self.past].expand(-1, -1, self.copies, -1)
        wide = torch.cat([shared, own.expand(*shared.shape[:3], -1)], dim=-1)
        self._made.append((mask, wide))
        return wide


def _agrees(model: LanguageModel, layer: int) -> bool:
    """Compare copies that are pushed apart at the layer's input with rows of their own, pushed alike."""
    rows = _pushed(model, layer, side_by_side=False)
    copies = _pushed(model, layer, side_by_side=True)
    error = (copies - rows).norm() / (rows - rows.mean(-1, keepdim=True)).norm()
    return bool(error <= (1e-4 if model.dtype == torch.float32 else 5e-2))


@torch.no_grad()
def _pushed(model: LanguageModel, layer: int, *, side_by_side: bool) -> Float[Tensor, "R V"]:
    copies, generator = 3, torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (2, 5), generator=generator)
    push = torch.randn(2 * copies, model.d_model, generator=generator).to(model.device)
    heads = [ids[0, :4].tolist(), ids[1, :2].tolist()]
    last, held = ids[:, 4:].to(model.device), torch.tensor([4, 2], device=model.device)
    cache = model.new_cache()
    model.forward(TokenBatch.pad(heads, model.pad_id, model.device), cache=cache, last=1)

    def apart(x: Tensor) -> RowDelta:
        batch, time = torch.ones(x.shape[:2], device=x.device).nonzero(as_tuple=True)
        size = x[batch, time].norm(dim=-1, keepdim=True) / model.d_model**0.5
        return RowDelta(batch, time, push.to(x.dtype) * size)

    with ExitStack() as stack:
        if side_by_side:
            stack.enter_context(unfolded(model, layer, copies, cache.length))
        else:
            cache.repeat(copies)
            last, held = last.repeat_interleave(copies, 0), held.repeat_interleave(copies)
        site = Site("resid_post", layer - 1) if layer else Site("resid_pre", 0)
        for handle in tap(model, site, apart):
            stack.callback(handle.remove)
        logits = model.forward(
            TokenBatch.full(last), cache=cache, past_lengths=held, last=copies if side_by_side else 1
        )
    return logits.reshape(2 * copies, -1).float()
