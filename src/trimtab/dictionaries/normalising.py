"""What SAELens does to activations before an SAE's encoder sees them, besides subtracting b_dec.

Two of its settings scale each activation by a number of its own, which an SAE has to do each time:

- `constant_norm_rescale`: z = x √d / ‖x‖ (Anthropic, Circuits Updates February 2024);
- `layer_norm`: z = (x − mean x) / (std x + 1e-5), with the deviation over d − 1.

Codes are those of z, as in SAELens; what is rebuilt is brought back to the units of x. (Division by std + ε, and
multiplication by std alone, is SAELens's own asymmetry.)

Two more are linear, the same for every activation, and become part of the weights (`fold_mean`, `fold_input_scale`):
a model whose writing weights TransformerLens centred, and activations of mean norm √d (`expected_average_only_in`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Normalisation = Literal["none", "constant_norm_rescale", "layer_norm"]
NORMALISATIONS: tuple[str, ...] = get_args(Normalisation)
_EPSILON = 1e-5


class RowScale(NamedTuple):
    """x ≈ z·unit + shift, for each activation."""

    z: Float[Tensor, "... d"]
    """What the encoder is given."""
    unit: Float[Tensor, "... 1"]
    """What 1 in z comes to in the units of x."""
    shift: Float[Tensor, "... 1"]
    """What is taken off x before it is scaled."""


def row_scale(kind: Normalisation, x: Float[Tensor, "... d"]) -> RowScale:
    """Scale each activation by its own norm or deviation.

    Args:
        kind: `constant_norm_rescale` or `layer_norm`.
        x: activations. One of norm 0 is left as it is.
    """
    if kind == "layer_norm":
        shift = x.mean(dim=-1, keepdim=True)
        centred = x - shift
        deviation = centred.std(dim=-1, keepdim=True)
        return RowScale(centred / (deviation + _EPSILON), deviation, shift)
    assert kind == "constant_norm_rescale"
    norm = x.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 0, norm, 1.0) / x.shape[-1] ** 0.5
    return RowScale(x / unit, unit, torch.zeros_like(unit))


def fold_input_scale(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights of an SAE that reads x, from those of one that reads scale·x: the same codes, x̂ divided by the scale."""
    encoder, decoder, bias = (weights[name].double() for name in ("W_enc", "W_dec", "b_dec"))
    folded = {"W_enc": encoder * scale, "W_dec": decoder / scale, "b_dec": bias / scale}
    return weights | {name: weight.to(_at_least_float32(weights[name])) for name, weight in folded.items()}


def fold_mean(weights: dict[str, Tensor], biases: tuple[str, ...], *, subtracts_b_dec: bool) -> dict[str, Tensor]:
    """Weights of an SAE that reads x, from those of one that reads x − mean(x): the same codes of every x.

    With P the projection that takes the mean off, (Px − b_dec) W_enc = (x − b_dec) P W_enc − (b_dec − P b_dec) W_enc,
    so that the encoder's columns lose their mean and, where b_dec has one, the encoder's biases take it up. Folding
    once more changes nothing.

    Args:
        weights: of the SAE.
        biases: those that are added to the encoder's product (b_enc, or both of a gated one).
        subtracts_b_dec: whether the encoder sees x − b_dec.
    """
    encoder, decoder_bias = weights["W_enc"].double(), weights["b_dec"].double()
    folded = {"W_enc": encoder - encoder.mean(dim=0)}
    if subtracts_b_dec:
        lost = decoder_bias.mean() * encoder.sum(dim=0)
        for name in biases:
            gain = weights["r_mag"].double().exp() if name == "b_mag" else 1.0
            folded[name] = weights[name].double() - lost * gain
    return weights | {name: weight.to(_at_least_float32(weights[name])) for name, weight in folded.items()}


def _at_least_float32(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
