"""Where the parts of a decoder are: its layers, and in each layer the attention and MLP branches.

Residual sites need only the list of layers. Attention sites need a layout that is known here:
the Llama family (Llama, SmolLM, Qwen, Mistral, Gemma) and GPT-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from trimtab.errors import UserError
from trimtab.lm.sites import HEAD_KINDS, Site

# Modules that hold the layer list in models we have met; others are found by their length.
LAYER_PATHS = (
    "model.layers",
    "transformer.h",
    "model.language_model.layers",
    "gpt_neox.layers",
    "model.decoder.layers",
)

MLPS = ("mlp", "feed_forward", "block_sparse_moe")
FINAL_NORMS = (
    "norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f", "layer_norm", "embedding_norm",
    "ln_out", "out_norm", "layernorm",
)  # fmt: skip
"""What the norm before the head is called; whether it is one is checked."""


@dataclass(frozen=True)
class AttentionLayout:
    """One layer's attention projections.

    `fused` is GPT-2's single projection for q, k and v; otherwise `q`, `k`, `v` are modules of their own.
    """

    out: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int
    q: nn.Module | None = None
    k: nn.Module | None = None
    v: nn.Module | None = None
    fused: nn.Module | None = None


@dataclass(frozen=True)
class LayerLayout:
    """One decoder layer: its module and, where known, the last module of each residual branch."""

    module: nn.Module
    attn_branch: nn.Module | None
    mlp_branch: nn.Module | None
    attention: AttentionLayout | None
    mlp_norm: nn.Module | None = None
    """What the MLP branch begins with; it is given the stream between the branches."""


@dataclass(frozen=True)
class Layout:
    """The parts of a causal language model that sites refer to."""

    layers: tuple[LayerLayout, ...]
    final_norm: nn.Module | None
    head: nn.Module


def check_site(layout: Layout, site: Site, name: str) -> None:
    """Raise a `UserError` if the model of that name has no such site, naming what it has."""
    if not 0 <= site.layer < len(layout.layers):
        raise UserError(
            f"site {site}", f"{name} has layers 0 to {len(layout.layers) - 1}", "choose a layer in that range"
        )
    layer = layout.layers[site.layer]
    needed = {"resid_mid": layer.mlp_norm, "attn_out": layer.attn_branch, "mlp_out": layer.mlp_branch}
    needed |= dict.fromkeys(HEAD_KINDS, layer.attention)
    if needed.get(site.kind, layer) is None:
        raise UserError(
            f"site {site}",
            f"{type(layer.module).__name__} has no attention of the Llama family (self_attn with q_proj, k_proj, "
            "v_proj, o_proj) or of GPT-2 (attn with c_attn, c_proj)",
            "use resid_pre or resid_post",
        )
    if site.head is not None:
        n_heads = head_count(layer, site)
        if not 0 <= site.head < n_heads:
            raise UserError(f"site {site}", f"{site.kind} has heads 0 to {n_heads - 1}", "choose one of them")


def head_count(layer: LayerLayout, site: Site) -> int:
    """Heads at an attention site of a layer that has one."""
    assert layer.attention is not None
    return layer.attention.n_kv_heads if site.kind in ("attn_k", "attn_v") else layer.attention.n_heads


def text_config(hf: transformers.PreTrainedModel) -> Any:
    """The decoder's own config, also where it is nested in a multimodal one."""
    return hf.config.get_text_config() if hasattr(hf.config, "get_text_config") else hf.config


def find_layout(hf: transformers.PreTrainedModel) -> Layout:
    """Locate layers, branches, final norm and head.

    Raises:
        UserError: no list of decoder layers was found; the message names what was looked for.
    """
    config = text_config(hf)
    path, modules = _find_layers(hf, config.num_hidden_layers)
    parent = hf.get_submodule(path.rpartition(".")[0]) if "." in path else hf
    parts = dict(parent.named_children())
    norm = next((parts[name] for name in FINAL_NORMS if name in parts), None)
    head = hf.get_output_embeddings()
    if head is None:
        raise UserError(
            f"model {type(hf).__name__}", "it has no output embedding (language-model head)", "load a causal LM"
        )
    return Layout(
        layers=tuple(_layer_layout(module, config) for module in modules),
        final_norm=norm,
        head=head,
    )


def _find_layers(hf: transformers.PreTrainedModel, n_layers: int) -> tuple[str, nn.ModuleList]:
    for path in LAYER_PATHS:
        try:
            found = hf.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList) and len(found) == n_layers:
            return path, found
    candidates = [(p, m) for p, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(candidates) == 1:
        return candidates[0]
    raise UserError(
        f"model {type(hf).__name__}",
        f"no list of {n_layers} layers at {', '.join(LAYER_PATHS)}, and {len(candidates)} other module lists of "
        "that length",
        "use a decoder whose layers are in one ModuleList",
    )


def _layer_layout(layer: nn.Module, config: Any) -> LayerLayout:
    attention = _attention_layout(layer, config)
    if attention is None:
        return LayerLayout(layer, None, None, None)
    sandwich = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    if all(hasattr(layer, name) for name in sandwich):  # Gemma 2 and 3: each branch ends in a norm of its own
        ends = (layer.get_submodule("post_attention_layernorm"), layer.get_submodule("post_feedforward_layernorm"))
        return LayerLayout(layer, *ends, attention, layer.get_submodule("pre_feedforward_layernorm"))
    llama = hasattr(layer, "input_layernorm") and hasattr(layer, "post_attention_layernorm")
    # In GLM-4 and Granite branches do not end where Llama's do.
    others = hasattr(layer, "post_self_attn_layernorm") or getattr(config, "residual_multiplier", 1) != 1
    if (llama or hasattr(layer, "ln_2")) and not others:
        norm = getattr(layer, "post_attention_layernorm" if llama else "ln_2")
        mlp = next((getattr(layer, name) for name in MLPS if hasattr(layer, name)), None)
        return LayerLayout(layer, attention.out, mlp, attention, norm)
    return LayerLayout(layer, None, None, attention)


def _attention_layout(layer: nn.Module, config: Any) -> AttentionLayout | None:
    attn = getattr(layer, "self_attn", None) or getattr(layer, "attn", None)
    if attn is None:
        return None
    n_heads = _number("num_attention_heads", config, attn) or _number("num_heads", attn)
    width = _number("hidden_size", config)
    if not n_heads or not width:
        return None
    n_kv = _number("num_key_value_heads", attn, config) or n_heads
    head_dim = _number("head_dim", attn, config) or width // n_heads
    if all(hasattr(attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")):
        return AttentionLayout(attn.o_proj, n_heads, n_kv, head_dim, q=attn.q_proj, k=attn.k_proj, v=attn.v_proj)
    if hasattr(attn, "c_attn") and hasattr(attn, "c_proj"):
        return AttentionLayout(attn.c_proj, n_heads, n_heads, head_dim, fused=attn.c_attn)
    return None


def _number(name: str, *holders: Any) -> int:
    """A whole number that the first holder to have it says; 0 if none does, as where each layer has its own."""
    for holder in holders:
        try:
            value = getattr(holder, name)
        except (AttributeError, KeyError, RuntimeError, ValueError):
            continue
        if isinstance(value, int) and value > 0:
            return value
    return 0
