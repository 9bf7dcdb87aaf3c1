"""Sets of features at a joint dose, which they share equally, by forward selection.

A set begins with the best single feature and with features that do nothing by themselves but bend the score: those
whose first-order effect changes most at a point that is steered to at random. For each beginning the gradient is taken
anew at the point that it steers to, so that a partner is found that works only together with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from trimtab.finding.choosing import Choice, choose
from trimtab.finding.first_order import FirstOrder, first_order
from trimtab.finding.ground import Ground
from trimtab.finding.shortlist import best_features
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.lm import Site

EXAMPLES = 4
"""On which gradients are taken anew."""
BENT, BEGINNINGS, PARTNERS = 2, 1, 2
"""Features that bend the score most, of either sign; best single ones; partners of each beginning."""
OPPOSITE = 0.01
"""Directions whose sum is so short cancel each other."""
SHARED = "set"


def forward_selection(ground: Ground, singles: Sequence[SteeringEdit], best: Choice) -> Choice:
    """The best set of up to `set_size` features, or what was best before.

    A larger set is taken if its mean effect on the examples to choose on is higher by more than the standard error of
    the difference; the search ends where it is not.

    Args:
        ground: what is searched.
        singles: single features, best first.
        best: what was chosen before; the candidates that it was chosen from are counted on.
    """
    beginnings = list(singles[:BEGINNINGS])
    for size in range(2, ground.options.set_size + 1):
        if size == 2:
            beginnings += [SteeringEdit((part,)) for part in bending(ground)]
        joined = _distinct([edit for start in beginnings for edit in _joined(ground, start, size)])
        chosen = choose(ground, {SHARED: joined}).get(SHARED) if joined else None
        if chosen is None:
            break
        difference, tried = chosen.effects - best.effects, best.tried + chosen.tried
        better = float(difference.mean()) > float(difference.std() / len(difference) ** 0.5)
        best = replace(chosen if better else best, tried=tried)
        if not better:
            break
        beginnings = [chosen.edit]
    return best


def bending(ground: Ground) -> list[Part]:
    """Features whose first-order effect changes most at a random point, with either sign."""
    generator = torch.Generator().manual_seed(ground.options.seed)
    dose = ground.options.dose[-1] / math.sqrt(len(ground.sites))
    parts = [
        ground.add_vector(site, torch.randn(sae.d_in, generator=generator))._replace(dose=dose)
        for site, sae in ground.saes.items()
    ]
    here, there = _gradients(ground), _gradients(ground, SteeringEdit(tuple(parts)))
    change = {site: replace(one, add=one.add - here[site].add) for site, one in there.items()}
    found = best_features(ground, lambda one: one.add.abs(), BENT, first=change)
    return [Part(site, row, sign) for site, row in found for sign in (1.0, -1.0)]


def _joined(ground: Ground, start: SteeringEdit, size: int) -> list[SteeringEdit]:
    """A beginning with each of the partners that the gradient proposes where it is steered to."""
    share = ground.options.dose[-1] / math.sqrt(size)
    there = _equal_shares(start.parts, share)
    first = _gradients(ground, SteeringEdit(tuple(there)))
    known = {(part.site, part.row) for part in start.parts}
    near = best_features(ground, lambda one: one.add.abs(), PARTNERS + len(known), first=first)
    partners = [Part(site, i, float(first[site].add[i])) for site, i in near if (site, i) not in known][:PARTNERS]
    joined = [SteeringEdit.joint([*there, *_equal_shares([part], share)], ground.tables) for part in partners]
    return [edit for edit in joined if edit.length > OPPOSITE]


def _gradients(ground: Ground, at: SteeringEdit | None = None) -> dict[Site, FirstOrder]:
    few = ground.splits["candidates"].take(range(min(EXAMPLES, len(ground.splits["candidates"]))))
    exact = ground.exact
    return first_order(exact.model, exact.saes, few, cache=exact.cache, at=at, tables=exact.tables)


def _equal_shares(parts: Sequence[Part], share: float) -> list[Part]:
    return [part._replace(dose=math.copysign(share, part.dose)) for part in parts]


def _distinct(edits: Sequence[SteeringEdit]) -> list[SteeringEdit]:
    """Edits of which none is another at another dose, or in another order."""
    return list({frozenset((p.site, p.row, p.dose > 0) for p in edit.parts): edit for edit in edits}.values())
