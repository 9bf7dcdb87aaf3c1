"""Where a model's numbers stop being numbers: looked for only once a NaN or an infinity has turned up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.batch import TokenBatch
from trimtab.lm.model import LanguageModel
from trimtab.lm.sites import Site, site_order
from trimtab.lm.taps import edited

_KINDS = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_out", "resid_post")


def not_finite_error(
    model: LanguageModel, ids: Sequence[int], what: str = "", *, edited_before: bool = False
) -> UserError:
    """The error that names the first place, in the order of the forward pass, at which an activation is not finite.

    Args:
        model: the model; it runs over the tokens once more, as it is.
        ids: the tokens up to the one at which something was not finite.
        what: that was not finite, for where the model by itself gives finite numbers: by default its logits.
        edited_before: the model was edited when it happened.
    """
    place, has_logits = _first_place(model, ids)
    if place is None:
        at = f"{what or 'the logits'} after {_token(model, ids, len(ids) - 1)}"
        if edited_before and has_logits:
            return UserError(at, "they are not finite with the edits that were made", "use a smaller dose")
        hint = "load it in float32 (--dtype float32)" if model.dtype != torch.float32 else "get the model again"
        return UserError(at, f"they are not finite, while {model.name}'s layers are", hint)
    site, position, values = place
    kind = "NaN" if values.isnan().any() else "infinite"
    what = f"activations at {site} of {_token(model, ids, position)}"
    found = f"the first that are not finite in {model.name} ({kind})"
    broken = _broken_weight(model, site.layer)
    if broken:
        return UserError(what, f"{found}, whose weight {broken} is not finite", "get the model again")
    if model.dtype != torch.float32:
        dtype = str(model.dtype).removeprefix("torch.")
        return UserError(what, f"{found}, in {dtype}", "load it in float32 (--dtype float32)")
    return UserError(what, found, "use another model or text: this one overflows in float32")


def _token(model: LanguageModel, ids: Sequence[int], position: int) -> str:
    return f"token {position} ({model.decode_ids([ids[position]], special=True)!r})"


@torch.no_grad()
def _first_place(model: LanguageModel, ids: Sequence[int]) -> tuple[tuple[Site, int, Tensor] | None, bool]:
    """The first site with an activation that is not finite, its first position there, and the activation; and whether
    the logits behind the last token are finite."""
    found: dict[Site, tuple[int, Tensor]] = {}

    def reader(site: Site) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            bad = (~x.isfinite()).flatten(2).any(-1)[0].nonzero()
            if len(bad):
                position = int(bad[0])
                found[site] = position, x[0, position]

        return read

    sites = [Site(kind, layer) for layer in range(model.n_layers) for kind in _KINDS]
    with edited(model, {site: reader(site) for site in sites if _has(model, site)}):
        logits = model.forward(TokenBatch.full(torch.tensor([list(ids)], device=model.device)), last=1)
    has_logits = bool(logits.logsumexp(-1).isfinite().all())
    if not found:
        return None, has_logits
    site = min(found, key=site_order)
    return (site, *found[site]), has_logits


def _has(model: LanguageModel, site: Site) -> bool:
    try:
        model.site(site)
    except UserError:
        return False
    return True


def _broken_weight(model: LanguageModel, layer: int) -> str:
    """The first weight of the embedding or the layer that holds what is not finite; empty if there is none."""
    module = model.layout.layers[layer].module
    prefix = next(name for name, part in model.hf.named_modules() if part is module)
    for owner, part in (("embedding", model.hf.get_input_embeddings()), (prefix, module)):
        for name, weight in part.named_parameters():
            if not bool(weight.isfinite().all()):
                return f"{owner}.{name}"
    return ""
