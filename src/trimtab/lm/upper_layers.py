"""Run a model from a layer up on given hidden states, and several copies of a token side by side.

Nothing of a model is rewritten, and it makes masks, positions and rotary embeddings itself. The layers below are not
run; each returns the given hidden states. Copies of a token stand side by side at its position: each sees what the
token saw and itself in the token's place, but no other copy. The contexts here go together with each other, with
`edited`, and with `capture`, which stops before the final norm.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.lm.batch import TokenBatch
from trimtab.lm.capturing import capture
from trimtab.lm.model import LanguageModel
from trimtab.lm.precision import FLOAT32, ProductPrecision, product_precision
from trimtab.lm.sites import Site, site_order
from trimtab.lm.taps import RowDelta, edited
from trimtab.lm.windows import fixed_window, short_windows

MOST_COPIES = 1024
"""More are not put side by side: what each may see of the others grows with their number's square."""

MASKED = -1e30
"""Logits up to this are masks."""
FAR = 100
"""So are those so many times as far below a row's largest logit as its upper sixteenth reaches."""

Way = Literal["start", "copies"]

_works: weakref.WeakKeyDictionary[transformers.PreTrainedModel, dict[tuple[Way, int, str, str], bool]] = (
    weakref.WeakKeyDictionary()
)
"""What works from a layer up under an attention implementation, products rounded so, as far as it has been tried."""


def first_edited_layer(sites: Sequence[Site]) -> int:
    """The first layer whose input may differ between rows that are edited differently at these sites."""
    first = min(sites, key=site_order)
    return first.layer + (first.kind == "resid_post")


def input_site(layer: int) -> Site:
    """Where a layer's input can be read; for the number of layers, what the last one gives."""
    return Site("resid_post", layer - 1) if layer else Site("resid_pre", 0)


@contextmanager
def starting_at(model: LanguageModel, layer: int, hidden: Float[Tensor, "B T d"]) -> Iterator[None]:
    """Forward passes begin at a layer. Where a model does not allow that, the layers below run again.

    Args:
        model: the model; what edits it is entered after this.
        layer: the first layer that runs; the number of layers for final norm and head alone.
        hidden: what `capture` finds at `input_site(layer)` for the tokens that are fed. Hooks on the layer below act
            on it.
    """
    if can_run_from(model, layer, "start"):
        with given_below(model, layer, hidden):
            yield
    else:
        yield


@contextmanager
def given_below(model: LanguageModel, layer: int, hidden: Float[Tensor, "B T d"]) -> Iterator[None]:
    """`starting_at` without asking whether the model allows it."""
    below = [found.module for found in model.layout.layers[:layer]]
    own = [module.__dict__.get("forward") for module in below]  # accelerate puts its own there
    try:
        for module in below:
            module.forward = lambda *_args, **_kwargs: hidden  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in zip(below, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]


@contextmanager
def side_by_side(model: LanguageModel, layer: int, copies: int, past: int) -> Iterator[None]:
    """Forward passes of one token per row go on with several copies of it from a layer's input on.

    Activations there are `[B, copies, …]`, and so are the logits if as many of the last positions are asked for; GPT-2
    gives the same values as `[B · copies, 1, …]`. Hooks on the layer below that were there before see copies as well.

    Args:
        model: one that can be run like this from the layer on: `can_run_from(model, layer, "copies")`.
        layer: the number of layers for copies of what the last one gives.
        copies: of each row.
        past: tokens in the cache, padding included.
    """

    def repeated(output: Any) -> Any:
        if isinstance(output, tuple):
            return (repeated(output[0]), *output[1:])
        return output.expand(-1, copies, -1).contiguous()

    def repeat_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (repeated(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": repeated(kwargs["hidden_states"])}

    layers = [found.module for found in model.layout.layers]
    place = torch.zeros(copies, dtype=torch.long, device=model.device)
    with _masked(model, layer, _CopyMasks(place, 1, originals=0, past=past)):
        # Before all other hooks: edits must find the copies.
        if layer:
            handle = layers[layer - 1].register_forward_hook(lambda _m, _a, output: repeated(output), prepend=True)
        else:
            handle = layers[0].register_forward_pre_hook(repeat_input, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def masked_as_copies(
    model: LanguageModel, layer: int, place: Int[Tensor, " S"], *, originals: int, past: int = 0
) -> Iterator[None]:
    """From a layer on, tokens see what they may as copies of others.

    Args:
        model: one that can be run like this from the layer on: `can_run_from(model, layer, "copies")`.
        place: which token of the forward pass each one is, or is a copy of.
        originals: so many of them come first and are seen from later places; all others are seen by themselves alone.
        past: tokens in the cache, padding included.
    """
    with _masked(model, layer, _CopyMasks(place.to(model.device), int(place.max()) + 1, originals, past)):
        yield


@contextmanager
def _masked(model: LanguageModel, layer: int, masks: _CopyMasks) -> Iterator[None]:
    with ExitStack() as stack:
        for found in model.layout.layers[layer:]:
            stack.callback(found.module.register_forward_pre_hook(masks.replace, with_kwargs=True).remove)
        yield


class _CopyMasks:
    """The attention masks that a model made, turned into those of copies of its tokens."""

    def __init__(self, place: Int[Tensor, " S"], size: int, originals: int, past: int) -> None:
        self.place, self.size, self.past = place, size, past
        number = torch.arange(len(place), device=place.device)
        self.visible = (number < originals) & (place != place[:, None]) | (number == number[:, None])
        self._made: list[tuple[Tensor | None, Tensor]] = []
        self._argument: dict[type[nn.Module], int] = {}

    def replace(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "attention_mask" in kwargs:
            return args, {**kwargs, "attention_mask": self._once(kwargs["attention_mask"])}
        at = self._argument.get(type(module))
        if at is None:
            at = list(inspect.signature(module.forward).parameters).index("attention_mask")
            self._argument[type(module)] = at
        return (*args[:at], self._once(args[at]), *args[at + 1 :]), kwargs

    def _once(self, mask: Tensor | None) -> Tensor:
        for given, made in self._made:
            if given is mask:
                return made
        made = self.of_copies(mask)
        self._made.append((mask, made))
        return made

    def of_copies(self, mask: Tensor | None) -> Tensor:
        """`[…, S, past + S]` of a mask `[…, T, past + T]`, or of None: what came before is seen."""
        if mask is None:
            seen = torch.ones(1, 1, self.size, self.past + self.size, dtype=torch.bool, device=self.place.device)
            mask = seen.tril(self.past)
        assert mask.ndim == 4
        unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        rows = mask[:, :, self.place.to(mask.device)]
        own = torch.where(self.visible.to(mask.device), rows[..., self.past + self.place.to(mask.device)], unseen)
        return torch.cat([rows[..., : self.past], own], dim=-1)


def can_run_from(model: LanguageModel, layer: int, way: Way) -> bool:
    """Whether a model can be run from a layer up, tried once on a few tokens against plain forward passes.

    Args:
        model: the model, with nothing of ours changing it at the moment.
        layer: the first layer that runs.
        way: `start`, with what the layers below gave; or `copies`, with copies of a token side by side.

    Raises:
        MemoryError, torch.OutOfMemoryError: they pass, and say nothing about the layer.
    """
    attention = str(getattr(model.hf.config.get_text_config(), "_attn_implementation", None))
    if way == "copies" and attention not in ("sdpa", "eager"):
        return False  # others do not take a mask of our own
    known = _works.setdefault(model.hf, {})
    precision = product_precision(model.dtype, model.device)
    tried = (way, layer, attention, precision.name)
    if tried not in known:
        expected = _pushed_if_possible(model, layer, None)
        if expected is None:  # something that changes the model at the moment does not fit these tokens
            return False
        found = _pushed_if_possible(model, layer, way)
        known[tried] = found is not None and agree(found, expected, precision)
    return known[tried]


def _pushed_if_possible(model: LanguageModel, layer: int, way: Way | None) -> Float[Tensor, "R V"] | None:
    try:
        with short_windows(model.hf, 2):
            return _pushed(model, layer, way)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever a foreign layer says to inputs that it does not know: it cannot be done there
        return None


def difference(found: Float[Tensor, "R V"], expected: Float[Tensor, "R V"]) -> float:
    """How far logits are from those expected, as a share of the spread that these have over the vocabulary.

    Tokens that a model masks, by −∞ or by a number far below all others, have no part in either: beside such numbers
    any difference would be small. Where logits are not masked that are expected to be, it is 1 at least.
    """
    floor = _floor(expected)
    seen = expected > floor
    error = torch.where(seen, found - expected, 0).norm()
    mean = torch.where(seen, expected, 0).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    spread = torch.where(seen, expected - mean, 0).norm()
    by = float(error / spread) if error != 0 else 0.0
    if not are_comparable(expected):
        return math.nan
    halfway = (expected.amax(-1, keepdim=True) + floor) / 2
    return by if math.isnan(by) or not bool((~seen & (found > halfway)).any()) else max(by, 1.0)


def are_comparable(logits: Float[Tensor, "... V"]) -> bool:
    """Whether each row has a logit that is not masked, and none that is NaN or +∞."""
    most = logits.amax(-1)
    return bool(((most > MASKED) & (most < math.inf)).all())


def _floor(logits: Float[Tensor, "... V"]) -> Float[Tensor, "... 1"]:
    """Logits up to this are masked: so far below the largest that no head gives both."""
    some = logits[..., :: max(1, logits.shape[-1] // 4096)]
    most = logits.amax(-1, keepdim=True)
    gap = most - some.topk(max(1, some.shape[-1] // 16), dim=-1).values[..., -1:]
    return torch.where(gap > 0, most - FAR * gap, MASKED).clamp(min=MASKED)


def allowed_difference(precision: ProductPrecision) -> float:
    """The difference of logits that rounding in a precision may make in any model."""
    return 1e-4 if precision.rounding <= FLOAT32.rounding else 5e-2


def agree(found: Float[Tensor, "R V"], expected: Float[Tensor, "R V"], precision: ProductPrecision) -> bool:
    """Whether logits differ by no more than rounding in the precision of products may make them differ."""
    return difference(found, expected) <= allowed_difference(precision)


@torch.no_grad()
def _pushed(model: LanguageModel, layer: int, way: Way | None) -> Float[Tensor, "R V"]:
    """Logits of three copies of two tokens behind a padded cache, each pushed elsewhere at the layer's input."""
    copies, generator = 3, torch.Generator().manual_seed(0)
    more = fixed_window(model.hf)
    ids = torch.randint(model.vocab_size, (2, 5 + more), generator=generator)
    push = torch.randn(2 * copies, model.d_model, generator=generator).to(model.device)
    heads = [ids[0, :-1].tolist(), ids[1, : 2 + more].tolist()]
    last, held = ids[:, -1:].to(model.device), torch.tensor([4 + more, 2 + more], device=model.device)
    cache = model.new_cache()
    model.forward(TokenBatch.pad(heads, model.pad_id, model.device), cache=cache, last=1)

    def apart(x: Tensor) -> RowDelta:
        batch, time = torch.ones(x.shape[:2], device=x.device).nonzero(as_tuple=True)
        size = x[batch, time].norm(dim=-1, keepdim=True) / model.d_model**0.5
        return RowDelta(batch, time, push.to(x.dtype) * size)

    with ExitStack() as stack:
        if way == "copies":
            stack.enter_context(side_by_side(model, layer, copies, cache.length))
        else:
            cache.repeat(copies)
            last, held = last.repeat_interleave(copies, 0), held.repeat_interleave(copies)
        batch = TokenBatch.full(last)
        if way == "start":
            site = input_site(layer)
            below = capture(model, batch, [site], cache=cache.frozen(), past_lengths=held)[site]
            stack.enter_context(given_below(model, layer, below))
        stack.enter_context(edited(model, {input_site(layer): apart}))
        logits = model.forward(batch, cache=cache, past_lengths=held, last=copies if way == "copies" else 1)
    return logits.reshape(2 * copies, -1).float()
