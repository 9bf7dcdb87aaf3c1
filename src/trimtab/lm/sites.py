"""Sites: named places in the forward pass, and the one mechanism that reads and edits them.

A tap calls `fn(x)` with the activation at a site, `[B, T, width]`, while the model runs. If `fn`
returns a `RowDelta`, the activation is changed there, skip path included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.errors import UserError

if TYPE_CHECKING:
    from trimtab.lm.layouts import AttentionLayout, LayerLayout
    from trimtab.lm.model import LanguageModel

RESIDUAL_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEAD_KINDS = ("attn_q", "attn_k", "attn_v", "attn_z")


class RowDelta(NamedTuple):
    """A change of some positions: `x[batch[r], time[r]] += delta[r]`."""

    batch: Tensor  # [R]
    time: Tensor  # [R]
    delta: Tensor  # [R, width]


_ORDER = ("resid_pre", "attn_q", "attn_k", "attn_v", "attn_z", "attn_out", "resid_mid", "mlp_out", "resid_post")

TapFunction = Callable[[Tensor], RowDelta | None]


class Site(NamedTuple):
    """A place in the forward pass: kind, layer and, for attention sites, optionally one head.

    `resid_pre`, `resid_mid` and `resid_post` are the residual stream before a layer, between its attention and MLP,
    and after it; `attn_out` and `mlp_out` what the branches add; `attn_q`, `attn_k`, `attn_v` projection outputs before
    QK-norm and RoPE (k and v indexed by KV head); `attn_z` the output projection's input, per query head.
    """

    kind: str
    layer: int
    head: int | None = None

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read `resid_post.15` or `attn_z.9.6`.

        Raises:
            UserError: the text is not a site's name.
        """
        if isinstance(text, Site):
            return text
        match = re.fullmatch(r"([a-z_]+)\.(\d+)(?:\.(\d+))?", text.strip())
        kinds = (*RESIDUAL_KINDS, *HEAD_KINDS)
        if not match or match[1] not in kinds or (match[3] is not None and match[1] not in HEAD_KINDS):
            raise UserError(
                f"site {text!r}",
                "a site is KIND.LAYER, or KIND.LAYER.HEAD for attention, KIND being one of " + ", ".join(kinds),
                "write it like resid_post.15 or attn_z.9.6",
            )
        return cls(match[1], int(match[2]), None if match[3] is None else int(match[3]))

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}" + ("" if self.head is None else f".{self.head}")


def site_order(site: Site) -> tuple[int, int]:
    """Sort key: the order in which a forward pass reaches sites."""
    return site.layer, _ORDER.index(site.kind)


def check_site(model: LanguageModel, site: Site) -> None:
    """Raise a `UserError` if the model has no such site, naming what it has."""
    if not 0 <= site.layer < model.n_layers:
        raise UserError(
            f"site {site}", f"{model.name} has layers 0 to {model.n_layers - 1}", "choose a layer in that range"
        )
    layer = model.layout.layers[site.layer]
    known = {
        "resid_mid": layer.attn_branch,
        "attn_out": layer.attn_branch,
        "mlp_out": layer.mlp_branch,
    }
    if (site.kind in known and known[site.kind] is None) or (site.kind in HEAD_KINDS and layer.attention is None):
        raise UserError(
            f"site {site}",
            f"{type(layer.module).__name__} has no attention of the Llama family (self_attn with q_proj, k_proj, "
            "v_proj, o_proj) or GPT-2 (attn with c_attn, c_proj) was found",
            "use resid_pre or resid_post",
        )
    if site.head is not None:
        n_heads = _head_count(site, layer)
        if not 0 <= site.head < n_heads:
            raise UserError(f"site {site}", f"{site.kind} has heads 0 to {n_heads - 1}", "choose one of them")


def site_width(model: LanguageModel, site: Site) -> int:
    """Size of the last dimension that a tap sees at a site."""
    if site.kind not in HEAD_KINDS:
        return model.d_model
    attention = _attention(model.layout.layers[site.layer])
    return attention.head_dim * (1 if site.head is not None else _head_count(site, model.layout.layers[site.layer]))


def tap(model: LanguageModel, site: Site, fn: TapFunction) -> list[RemovableHandle]:
    """Call `fn` at a site in every forward pass until the returned handles are removed."""
    layer = model.layout.layers[site.layer]
    if site.kind == "resid_pre":
        return [layer.module.register_forward_pre_hook(_before_layer(fn), with_kwargs=True)]
    if site.kind == "resid_post":
        return [layer.module.register_forward_hook(_after(fn))]
    if site.kind == "attn_out":
        return [_module(layer.attn_branch).register_forward_hook(_after(fn))]
    if site.kind == "mlp_out":
        return [_module(layer.mlp_branch).register_forward_hook(_after(fn))]
    if site.kind == "resid_mid":
        return _tap_resid_mid(layer, fn)
    return _tap_heads(site, layer, fn)


def apply_rows(x: Tensor, change: RowDelta) -> Tensor:
    """`x [B, T, width]` with the rows of `change` added; `x` itself is left as it is."""
    if x.shape[1] == 1 and len(change.batch) == x.shape[0]:  # one token per row, every row edited, in order
        return x + change.delta[:, None].to(x.dtype)
    out = x.clone()
    out[change.batch, change.time] += change.delta.to(x.dtype)
    return out


def _after(fn: TapFunction) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        change = fn(x)
        if change is None:
            return None
        edited = apply_rows(x, change)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

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


def _tap_resid_mid(layer: LayerLayout, fn: TapFunction) -> list[RemovableHandle]:
    """Between the branches the stream exists only as a sum, so the change goes onto the attention branch."""
    skip: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        skip[:] = [_layer_input(args, kwargs)]

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        change = fn(skip.pop() + output)
        return None if change is None else apply_rows(output, change)

    return [
        layer.module.register_forward_pre_hook(keep, with_kwargs=True),
        _module(layer.attn_branch).register_forward_hook(hook),
    ]


def _tap_heads(site: Site, layer: LayerLayout, fn: TapFunction) -> list[RemovableHandle]:
    attention = _attention(layer)
    width = attention.head_dim
    part = 0  # where this site's columns start in the module's output
    if site.kind != "attn_z" and attention.fused is not None:
        part = ("attn_q", "attn_k", "attn_v").index(site.kind) * attention.n_heads * width
    columns = slice(part, part + _head_count(site, layer) * width)
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


def _head_count(site: Site, layer: LayerLayout) -> int:
    attention = _attention(layer)
    return attention.n_kv_heads if site.kind in ("attn_k", "attn_v") else attention.n_heads


def _attention(layer: LayerLayout) -> AttentionLayout:
    assert layer.attention is not None, "check_site has not been called"
    return layer.attention


def _module(module: nn.Module | None) -> nn.Module:
    assert module is not None, "check_site has not been called"
    return module
