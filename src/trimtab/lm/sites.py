"""Sites: names of places in the forward pass."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from trimtab.errors import UserError

RESIDUAL_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEAD_KINDS = ("attn_q", "attn_k", "attn_v", "attn_z")
KINDS = (*RESIDUAL_KINDS, *HEAD_KINDS)
_ORDER = ("resid_pre", "attn_q", "attn_k", "attn_v", "attn_z", "attn_out", "resid_mid", "mlp_out", "resid_post")


class Site(NamedTuple):
    """A place in the forward pass: kind, layer and, for attention sites, optionally one head.

    `resid_pre`, `resid_mid` and `resid_post` are the residual stream before a layer, between its attention and MLP,
    and after it; `attn_out` and `mlp_out` what the branches add; `attn_q`, `attn_k`, `attn_v` projection outputs before
    QK-norm and RoPE (k and v indexed by KV head); `attn_z` the output projection's input, per query head.
    """

    kind: str
    layer: int
    head: int | None = None

    def __repr__(self) -> str:
        return f"Site({str(self)!r})"

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read `resid_post.15` or `attn_z.9.6`.

        Raises:
            UserError: the text is not a site's name; the message proposes one for names of TransformerLens and others.
        """
        if isinstance(text, Site):
            return text
        match = re.fullmatch(r"([a-z_]+)\.(\d+)(?:\.(\d+))?", str(text).strip())
        if not match or match[1] not in KINDS or (match[3] is not None and match[1] not in HEAD_KINDS):
            likely = _likely(str(text))
            raise UserError(
                f"site {text!r}",
                "a site is KIND.LAYER, or KIND.LAYER.HEAD for attention, KIND being one of " + ", ".join(KINDS),
                f"did you mean {likely}?" if likely else "write it like resid_post.15 or attn_z.9.6",
            )
        return cls(match[1], int(match[2]), None if match[3] is None else int(match[3]))

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}" + ("" if self.head is None else f".{self.head}")


def site_order(site: Site) -> tuple[int, int]:
    """Sort key: the order in which a forward pass reaches sites."""
    return site.layer, _ORDER.index(site.kind)


_OTHER_NAMES = {**dict.fromkeys(("layers", "layer", "blocks", "h", "resid", ""), "resid_post"), "self_attn": "attn_out"}


def _likely(text: str) -> str:
    """The site that a text most likely means, misspelt or as other libraries call it; empty if that cannot be told.

    `blocks.15.hook_resid_post`, `model.layers.15` and `15` are `resid_post.15`, `blocks.9.attn.hook_z` is `attn_z.9`.
    """
    numbers = [] if ".-" in text else re.findall(r"\d+", text)  # nothing counts from the end
    words = re.findall(r"[a-z_]+", re.sub(r"[-\s]", "_", text.lower()))
    for word in reversed(words) if words else [""] if text.strip().isdigit() else []:
        name = word.strip("_").removeprefix("hook_")
        name = f"attn_{name}" if name in ("q", "k", "v", "z") else _OTHER_NAMES.get(name, name)
        if numbers and (close := difflib.get_close_matches(name, KINDS, 1)):
            return ".".join([close[0], *numbers[: 1 + (close[0] in HEAD_KINDS)]])
    return ""
