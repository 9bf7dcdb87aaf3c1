"""What other tools' files hold: one vector per layer, added as it is to the layer's output at every token.

It is less than a steering can say. What goes beyond is refused, or converted where a number that decides it is given: a
relative dose becomes a length by the typical ‖x‖.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import LanguageModel, Site, edit_delta
from trimtab.steering.saved_steering import Steering
from trimtab.steering.sources import VectorSource
from trimtab.steering.steering_facts import SteeringPart

POSITIONS = "all"
"""Where other tools add them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AddedVectors:
    """Vectors by layer, counted from 0: what is added to the output of layer N, which is `resid_post.N`."""

    layers: Mapping[int, Float[Tensor, " d"]]
    architecture: str = ""
    """As GGUF files call it; empty if the file does not say."""
    norms: Mapping[int, float] = field(default_factory=dict)
    """The ‖x‖ by which relative doses became lengths, of each layer."""

    def steering(self, model: LanguageModel, *, positions: str, about: str, made_by: str) -> Steering:
        """The steering that adds them, their lengths as absolute doses.

        Raises:
            UserError: the model has no such layers or another width; or all vectors are zero.
        """
        for layer, row in self.layers.items():
            if not bool(torch.isfinite(row).all()):
                raise UserError(f"layer {layer} of {about}", "some values are not finite", "get the file again")
        kept = {f"resid_post.{layer}": row for layer, row in sorted(self.layers.items()) if bool(row.any())}
        if not kept:
            raise UserError(about, "all its vectors are zero", "give another file")
        for site, row in kept.items():
            model.site(site)
            if len(row) != model.d_model:
                why = f"{model.name} has width {model.d_model}"
                raise UserError(f"{about} of width {len(row)}", why, "give the model that it was made for (--model)")
        source = VectorSource(dict(kept), keep_length=True, positions=positions)
        return Steering.of(model, source, about=about, made_by=made_by)


def added_vectors(
    steering: Steering, *, positions: str | None = None, norms: float | Mapping[str, float] | None = None
) -> AddedVectors:
    """What a steering adds, as vectors of other tools.

    Args:
        steering: adds at the residual stream behind layers.
        positions: `all`, to let it steer everywhere where the steering itself does so at some positions alone.
        norms: typical ‖x‖ at all sites or by site, by which relative doses become lengths; where the steering states
            them, they are known.

    Raises:
        UserError: the steering does what no vector can: another operation, another site, some positions alone; or its
            doses are relative and no norm is known.
    """
    if steering.operation != "add":
        why = "other tools' files hold vectors that are added"
        raise UserError(f"operation {steering.operation} of {steering.label}", why, "take it away as a steering")
    if (positions or steering.positions) != POSITIONS:
        what = f"positions {positions or steering.positions} of {steering.label}"
        why = "other tools add their vectors at every token, the prompt's included"
        raise UserError(what, why, f"say that you want that: --positions {POSITIONS}")
    source, layers, used = steering.source(), dict[int, Tensor](), dict[int, float]()
    for part in steering.parts:
        site = Site.parse(part.site)
        layer, table, x = _layer(site), source.tables[site], torch.zeros(1, source.tables[site].width)
        if steering.unit == "relative":
            used[layer] = _norm(part, norms)
        x[0, 0] = used.get(layer, 1.0)  # of an activation only its length counts where directions are added
        row = edit_delta(table.rows, source.edit(x, source.choices[site], table))[0]
        layers[layer] = layers.get(layer, 0) + row
    return AddedVectors(layers=layers, architecture=plain_name(steering.model.architecture), norms=used)


def plain_name(architecture: str) -> str:
    """An architecture as GGUF files call it, which do not know a multimodal model's text model apart."""
    return architecture.removesuffix("_text")


def _layer(site: Site) -> int:
    """The layer whose output a site is."""
    layer = site.layer - (site.kind == "resid_pre")
    if site.kind not in ("resid_post", "resid_pre") or layer < 0:
        why = "other tools add their vectors to the outputs of layers, which are resid_post"
        raise UserError(f"site {site}", why, "take it away as a steering")
    return layer


def _norm(part: SteeringPart, norms: float | Mapping[str, float] | None) -> float:
    """The typical ‖x‖ at a site, as given or as the steering states it."""
    given = norms.get(part.site) if isinstance(norms, Mapping) else norms
    norm = part.norm if given is None else given
    if not isinstance(norm, int | float) or not 0 < norm < math.inf:
        why = "a vector of other tools has one length, and the typical ‖x‖ that this dose is a share of is not known"
        raise UserError(f"the relative dose at {part.site}", why, "state it, above 0: --norm 120")
    return norm
