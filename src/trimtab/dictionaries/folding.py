"""Bring a trained SAE into model units: norms out of the decoder, then the input scale out of the weights.

SAEs train on s·x, one scalar s for all activations, with decoder norms that may drift. Users want codes in the units of
x and decoder rows of norm one. Both changes are exact in exact arithmetic.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from trimtab.dictionaries.sae import SAE

AnySAE = TypeVar("AnySAE", bound=SAE)


def fold_norms(sae: AnySAE) -> AnySAE:
    """The same function of x with unit decoder rows: f′_i = ‖W_dec[i]‖·f_i, which a TopK SAE that rescales calls f_i.

    A TopK SAE that does not rescale by decoder norm comes back unchanged, and supervised codes do, since the fold would
    change which features win; and a zero row stays zero.
    """
    rescales = sae.settings.get("rescale_acts_by_decoder_norm")
    if rescales is False or not sae.folds_norms:
        return sae
    weights = _in_float64(sae)
    norms = weights["W_dec"].norm(dim=-1)
    norms = torch.where(norms > 0, norms, 1.0)
    weights["W_dec"] /= norms[:, None]
    weights["W_enc"] *= norms
    for name in set(sae.in_code_units) & set(weights):
        weights[name] *= norms
    return _with(sae, weights) if rescales is None else _with(sae, weights, rescale_acts_by_decoder_norm=False)


def fold_scale(sae: AnySAE, scale: float) -> AnySAE:
    """An SAE trained on scale·x as one that reads x: f(x) = f_scaled(scale·x)/scale and x̂ = x̂_scaled(scale·x)/scale.

    Decoder norms are folded first (`fold_norms`); then biases and thresholds are divided by the scale. W_enc stays as
    it is, because codes shrink as x does.
    """
    if not (scale > 0 and torch.isfinite(torch.tensor(scale))):
        raise ValueError(f"the input scale must be positive and finite, not {scale}")
    sae = fold_norms(sae)
    weights = _in_float64(sae)
    for name in {*sae.in_code_units, "b_dec"} & set(weights):
        weights[name] /= scale
    return _with(sae, weights)


def _in_float64(sae: SAE) -> dict[str, Tensor]:
    return {name: getattr(sae, name).detach().to(torch.float64, copy=True) for name in sae.shapes}


def _with(sae: AnySAE, weights: dict[str, Tensor], **changed: Any) -> AnySAE:
    """A copy with other weights, in the original's precision."""
    weights = {name: weight.to(sae.W_dec.dtype) for name, weight in weights.items()}
    return type(sae)(**weights, **sae.settings | changed, info=sae.info)
