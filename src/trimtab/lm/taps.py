"""The one mechanism that reads and edits activations at sites.

A tap calls `fn(x)` with the activation at a site, `[B, T, width]`, while the model runs. If `fn` returns a `RowDelta`
or `Coordinates`, the activation is changed there, skip path included, and gradients flow to all that was not replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.lm.layouts import AttentionLayout, LayerLayout, Layout, head_count
from trimtab.lm.model import LanguageModel
from trimtab.lm.sites import HEAD_KINDS, Site, site_order


class RowDelta(NamedTuple):
    """A change of some positions: `x[batch[r], time[r]] += delta[r]`, once `base[r]` has taken x's place."""

    batch: Tensor  # [R]
    time: Tensor  # [R]
    delta: Tensor  # [R, width]
    base: Tensor | None = None  # [R, width] takes x's place where it is not NaN, bit for bit

    def of(self, x: Float[Tensor, "R d"]) -> Float[Tensor, "R d"]:
        """What becomes of the rows' activations."""
        if self.base is not None:
            x = torch.where(self.base.isnan(), x, self.base.to(x.dtype))
        return x + self.delta.to(x.dtype)


class Coordinates(NamedTuple):
    """Coordinates that are set at every position, bit for bit: `x[b, t, dims] = values[b]`, or `values[b, t]`."""

    dims: Tensor  # [K]
    values: Tensor  # [B, K], or [1, K] for all rows alike, or [B, T, K]

    @property
    def by_position(self) -> Float[Tensor, "B T K"] | Float[Tensor, "B 1 K"]:
        """The values, with an axis for positions."""
        return self.values if self.values.ndim == 3 else self.values[:, None]


class CoordinateReader(NamedTuple):
    """Coordinates that are read at every position: `keep(x[..., dims])`, a copy that gradients flow through."""

    dims: Tensor  # [K]
    keep: Callable[[Tensor], None]

    def read(self, x: Float[Tensor, "B T d"]) -> None:
        """Keep them."""
        self.keep(x.index_select(-1, self.dims.to(x.device)))


Change = RowDelta | Coordinates
TapFunction = Callable[[Tensor], Change | None]
Tap = TapFunction | Coordinates | CoordinateReader
"""What is done at a site. The last two need no copy of an activation to look at."""


def site_width(model: LanguageModel, site: Site) -> int:
    """Size of the last dimension that a tap sees at a site."""
    if site.kind not in HEAD_KINDS:
        return model.d_model
    layer = model.layout.layers[site.layer]
    return _attention(layer).head_dim * (1 if site.head is not None else head_count(layer, site))


def tap(layout: Layout, site: Site, given: Tap) -> list[RemovableHandle]:
    """Tap a site, which must exist, in every forward pass until the returned handles are removed."""
    layer = layout.layers[site.layer]
    if site.kind == "resid_mid":
        return [_module(layer.mlp_norm).register_forward_pre_hook(_before_norm(given))]
    fn = _function(given)
    if site.kind == "resid_pre":
        return [layer.module.register_forward_pre_hook(_before_layer(fn), with_kwargs=True)]
    if site.kind == "resid_post":
        return [layer.module.register_forward_hook(_after(fn))]
    if site.kind == "attn_out":
        return [_module(layer.attn_branch).register_forward_hook(_after(fn))]
    if site.kind == "mlp_out":
        return [_module(layer.mlp_branch).register_forward_hook(_after(fn))]
    return _tap_heads(site, layer, fn)


@contextmanager
def edited(model: LanguageModel, edits: Mapping[Site, Tap]) -> Iterator[None]:
    """Apply edits in every forward pass inside the block.

    Args:
        model: the model; its hooks are removed on leaving.
        edits: per site a function from the activation `[B, T, width]` to the rows to change, or None; or coordinates
            to set or to read.

    Raises:
        UserError: a site does not exist in the model.
    """
    with hooked(model.layout, {model.site(site): fn for site, fn in edits.items()}):
        yield


@contextmanager
def hooked(layout: Layout, edits: Mapping[Site, Tap]) -> Iterator[None]:
    """`edited` for a model of which no more is known than where its parts are; the sites must exist."""
    with ExitStack() as stack:
        for site, fn in sorted(edits.items(), key=lambda item: site_order(item[0])):
            for handle in tap(layout, site, fn):
                stack.callback(handle.remove)
        yield


def apply_rows(x: Tensor, change: Change) -> Tensor:
    """`x [B, T, width]` with what `change` says changed; `x` itself is left as it is."""
    if isinstance(change, Coordinates):
        out = x.clone()
        out[..., change.dims.to(x.device)] = change.by_position.to(x)
        return out
    if x.shape[1] == 1 and len(change.batch) == x.shape[0]:  # one token per row, every row edited, in order
        return change.of(x[:, 0])[:, None]
    out = x.clone()
    out[change.batch, change.time] = change.of(x[change.batch, change.time])
    return out


def _function(given: Tap) -> TapFunction:
    if isinstance(given, Coordinates):
        return lambda _x: given
    return given.read if isinstance(given, CoordinateReader) else given


def _after(fn: TapFunction) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        several = isinstance(output, tuple | list)
        x = output[0] if several else output
        change = fn(x)
        if change is None:
            return None
        edited = apply_rows(x, change)
        return (edited, *output[1:]) if several else edited

    return hook


def _layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _before_layer(fn: TapFunction) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _layer_input(args, kwargs)
        change = fn(x)
        if change is None:
            return None
        edited = apply_rows(x, change)
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    return hook


def _before_norm(given: Tap) -> Callable[..., None]:
    """Between the branches the stream is the very tensor that the second norm is given, and the skip path with it.

    It is changed in place, before the norm reads it: nobody else holds it, and the sum that made it needs it for no
    gradient. What a function is shown is a copy, which stays as it was.
    """

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if isinstance(given, CoordinateReader):
            given.read(x)
        elif isinstance(given, Coordinates):
            x[..., given.dims.to(x.device)] = given.by_position.to(x)
        elif (change := given(x.clone())) is not None:
            x.copy_(apply_rows(x, change))

    return hook


def _tap_heads(site: Site, layer: LayerLayout, fn: TapFunction) -> list[RemovableHandle]:
    attention = _attention(layer)
    width = attention.head_dim
    part = 0  # where this site's columns start in the module's output
    if site.kind != "attn_z" and attention.fused is not None:
        part = ("attn_q", "attn_k", "attn_v").index(site.kind) * attention.n_heads * width
    columns = slice(part, part + head_count(layer, site) * width)
    if site.head is not None:
        columns = slice(part + site.head * width, part + (site.head + 1) * width)

    def changed(x: Tensor) -> Tensor | None:
        change = fn(x[..., columns])
        if change is None:
            return None
        out = x.clone()
        out[..., columns] = apply_rows(x[..., columns], change)
        return out

    if site.kind == "attn_z":

        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            out = changed(args[0])
            return None if out is None else (out, *args[1:])

        return [attention.out.register_forward_pre_hook(before)]
    module = attention.fused or {"attn_q": attention.q, "attn_k": attention.k, "attn_v": attention.v}[site.kind]

    def after(_hooked: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        return changed(output)

    return [_module(module).register_forward_hook(after)]


def _attention(layer: LayerLayout) -> AttentionLayout:
    assert layer.attention is not None, "model.site has not been called"
    return layer.attention


def _module(module: nn.Module | None) -> nn.Module:
    assert module is not None, "model.site has not been called"
    return module
