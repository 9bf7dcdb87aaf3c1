"""Sites: names of places in the forward pass."""

from __future__ import annotations

import re
from typing import NamedTuple

from trimtab.errors import UserError

RESIDUAL_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEAD_KINDS = ("attn_q", "attn_k", "attn_v", "attn_z")
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
