"""Sites by the names that other libraries give them.

Only what is certain becomes a site. The output of a whole layer is `resid_post`; that of an MLP or attention module is
what the branch adds in most models but not in all (Gemma norms it first), so that it stays without a site.
"""

from __future__ import annotations

import re

_LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)")
_KIND = re.compile(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out)(?:(?:_layer)?[_.]?(\d+))?")
_HEADS = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.self_attn\.o_proj\.input")
_MLP_NORM = re.compile(r"(?:.*\.)?layers\.(\d+)\.post_feedforward_layernorm(?:\.output)?")
"""Gemma's, whose output is what the MLP adds."""


def site_of_module(path: str) -> str:
    """`model.layers.7` → `resid_post.7`; empty for what is not certain.

    `.output` or `.input` may follow: the input of a layer is `resid_pre`, that of the attention's output projection
    `attn_z` of all heads.
    """
    if match := _LAYER.fullmatch(path.removesuffix(".output").removesuffix(".input")):
        return f"resid_{'pre' if path.endswith('.input') else 'post'}.{match[1]}"
    for pattern, kind in ((_HEADS, "attn_z"), (_MLP_NORM, "mlp_out")):
        if match := pattern.fullmatch(path):
            return f"{kind}.{match[1]}"
    return ""


def site_of_submodule(name: str, layer: object) -> str:
    """`resid_post_layer_7`, or `resid_post` and 7 → `resid_post.7`; empty if unclear or contradictory."""
    match = _KIND.fullmatch(name)
    found = f"{match[1]}.{match[2] or layer}" if match else site_of_module(name)
    number = found.rpartition(".")[2]
    agrees = not isinstance(layer, int) or number == str(layer)
    return found if number.isdigit() and agrees else ""
