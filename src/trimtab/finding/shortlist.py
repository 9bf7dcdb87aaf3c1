"""What causal search tries: the features that the gradient puts first, alone and together, and random ones beside them.

Features are ranked by how certain their first-order effect is, over all sites, the best of each among them; apart from
these by the same among features that also read the wish. The best are tried together, too, as one direction in which
each has the weight of its effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.finding.first_order import FirstOrder
from trimtab.finding.ground import Ground
from trimtab.finding.result import Origin
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.lm import Site

READS = 0.1
"""A feature reads a wish if its AUC is at least so far from one half."""
SIZES = 4, 16, 64
"""Features that are tried together."""
DRAWS = 3
"""Independent draws of random features, each of as many as other ways try."""
RANDOM = 1009
"""Key of the draws, apart from others."""


def shortlist(ground: Ground) -> dict[SteeringEdit, Origin]:
    """Candidates of causal search at dose 1, and what put each there."""
    first, count = ground.first_order, ground.options.shortlist
    best = best_features(ground, _certainty, max(count, ground.options.set_size))
    each = [best_features(ground, _certainty, 1, {site: one}) for site, one in first.items()]
    readers = best_features(ground, _certainty_of_readers, max(count, ground.options.set_size))
    found: dict[SteeringEdit, Origin] = {_signed(first, at): "gradient" for at in (*best[:count], *chain(*each))}
    for at in readers[: -(-count // 2)]:
        found.setdefault(_signed(first, at), "reads")
    for site, i in best_features(ground, lambda one: one.remove, max(1, count // 4)):
        found[SteeringEdit((Part(site, i, 0.0),), "ablate")] = "removal"
    for size in SIZES:
        for of in (best, readers):
            if size <= min(len(of), ground.options.set_size):
                parts = [Part(site, i, float(first[site].add[i])) for site, i in of[:size]]
                found[SteeringEdit.joint(parts, ground.tables).at_dose(1.0)] = "together"
    return found


def random_features(ground: Ground) -> list[list[SteeringEdit]]:
    """Draws of live features at random, of the signs that the gradient gives them."""
    rng = np.random.default_rng([ground.options.seed, RANDOM])
    live = [(site, i) for site, ids in ground.live.items() for i in ids.tolist()]
    picked = rng.permutation(len(live))[: DRAWS * ground.options.tried]
    edits = [_signed(ground.first_order, live[i]) for i in picked]
    return [edits[i::DRAWS] for i in range(min(DRAWS, len(edits)))]


def best_features(
    ground: Ground, by: Callable[[FirstOrder], Float[Tensor, " n"]], count: int,
    first: Mapping[Site, FirstOrder] | None = None,
) -> list[tuple[Site, int]]:  # fmt: skip
    """The live features with the largest values above 0 over all sites, best first.

    Args:
        ground: what is searched.
        by: from a site's first-order effects to values.
        count: features at most.
        first: effects by site; by default those of the candidates' examples.
    """
    places: list[tuple[float, Site, int]] = []
    for site, one in (ground.first_order if first is None else first).items():
        live = ground.live[site]
        top = by(one)[live].nan_to_num(0.0).topk(min(count, len(live)))
        places += [(v, site, int(live[i])) for v, i in zip(top.values.tolist(), top.indices, strict=True) if v > 0]
    return [(site, i) for _, site, i in sorted(places, key=lambda each: -each[0])[:count]]


def predicted(first: Mapping[Site, FirstOrder], edit: SteeringEdit) -> float:
    """What the gradient says of an edit by features."""
    if edit.operation == "ablate":
        return sum(float(first[part.site].remove[part.row]) for part in edit.parts)
    return sum(float(first[part.site].add[part.row]) * part.dose for part in edit.parts)


def _certainty(one: FirstOrder) -> Float[Tensor, " n"]:
    return one.certainty.abs()


def _certainty_of_readers(one: FirstOrder) -> Float[Tensor, " n"]:
    """The same where a feature is added that fires on what is wanted, or subtracted that fires on what is not."""
    reads = one.auc - 0.5
    return torch.where((reads.abs() >= READS) & (reads * one.add > 0), one.certainty.abs(), 0.0)


def _signed(first: Mapping[Site, FirstOrder], at: tuple[Site, int]) -> SteeringEdit:
    site, i = at
    return SteeringEdit((Part(site, i, 1.0 if first[site].add[i] > 0 else -1.0),))
