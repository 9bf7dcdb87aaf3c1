"""Read activations at named sites, running the model no further than the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.lm.batch import TokenBatch
from trimtab.lm.cache import GrowingCache
from trimtab.lm.model import LanguageModel
from trimtab.lm.sites import HEAD_KINDS, Site, site_order
from trimtab.lm.taps import edited, site_width


class _LastSiteRead(Exception):  # noqa: N818 - a signal, not an error
    pass


def capture(
    model: LanguageModel,
    batch: TokenBatch,
    sites: Sequence[Site | str],
    *,
    cache: GrowingCache | None = None,
    past_lengths: Tensor | None = None,
    gradients: bool = False,
) -> dict[Site, Tensor]:
    """Activations at sites for every token of a batch; the forward pass stops at the last site.

    Args:
        model: the model; inside `edited(...)` the edits are seen.
        batch: tokens.
        sites: names or sites.
        cache: as in `LanguageModel.forward`; only the layers that ran are filled.
        past_lengths: as in `LanguageModel.forward`.
        gradients: let them reach what edits put in, where they are on.

    Returns:
        For each site `[B, T, d]`; for attention sites `[B, T, heads, head_dim]`, or `[B, T, head_dim]` for one head.
        On padding the values are meaningless.

    Raises:
        UserError: a site is malformed or out of range.
    """
    wanted = sorted({model.site(site) for site in sites}, key=site_order)
    found: dict[Site, Tensor] = {}

    def read(site: Site, x: Tensor) -> None:
        cut = site.kind in HEAD_KINDS and site.head is None
        found[site] = x.unflatten(-1, (-1, site_width(model, site._replace(head=0)))) if cut else x
        if site == wanted[-1]:
            raise _LastSiteRead

    on = gradients and torch.is_grad_enabled()
    taps = {site: partial(read, site) for site in wanted}
    with torch.set_grad_enabled(on), suppress(_LastSiteRead), edited(model, taps):
        model.forward(batch, cache=cache, past_lengths=past_lengths, last=1)
    return found


def last_activations(model: LanguageModel, texts: str | Sequence[str], site: Site | str) -> Float[Tensor, "N width"]:
    """The activation at each text's last token, as for a difference of means.

    Args:
        model: the model.
        texts: one, or several.
        site: a name or a site.

    Raises:
        UserError: a text gives no token, or the site does not exist.
    """
    texts = [texts] if isinstance(texts, str) else texts
    batch = TokenBatch.pad([model.encode_text(text) for text in texts], model.pad_id, model.device)
    return capture(model, batch, [site])[model.site(site)][:, -1]
