"""Sets of features at a joint dose, which they share equally, by forward selection.

A set begins with the best single features and with features that do nothing by themselves but bend the score: those
whose first-order effect changes most at points that are steered at random. For each beginning the gradient is taken
anew at the point that it steers to, so that a partner is found that works only together with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.finding.choosing import Choice, choose
from trimtab.finding.first_order import FirstOrder, first_order
from trimtab.finding.ground import Ground
from trimtab.finding.steering_edit import Part, SteeringEdit, Tables
from trimtab.lm import Site
from trimtab.steering import DirectionTable

EXAMPLES = 4
"""On which gradients are taken anew."""
PROBES, BENT, BEGINNINGS, PARTNERS = 1, 2, 2, 2
"""Random points; features that bend the score most, of either sign; single features; partners of each beginning."""


def forward_selection(ground: Ground, singles: Sequence[SteeringEdit], best: Choice) -> Choice:
    """The best set of up to `set_size` features, or the best single one.

    A larger set is taken if its mean effect on the examples to choose on is higher by more than the standard error of
    the difference.

    Args:
        ground: what is searched.
        singles: single features, best first.
        best: what was chosen among them.
    """
    added = [edit for edit in singles if edit.operation == "add"][:BEGINNINGS]
    mine = [best.edit] * (best.edit.operation == "add")
    if ground.options.set_size == 1:
        return best
    ground.meter.describe("sets of features")
    beginnings = _distinct([*mine, *added])[:BEGINNINGS]
    beginnings += [SteeringEdit((part,)) for part in bending(ground)]
    for size in range(2, ground.options.set_size + 1):
        joined = [edit for start in beginnings for edit in _joined(ground, start, size)]
        if not joined:
            break
        chosen = choose(ground, _distinct(joined))
        difference = chosen.effects - best.effects
        if float(difference.mean()) > float(difference.std() / len(difference) ** 0.5):
            best = chosen
        beginnings = _distinct([chosen.edit])
    return best


def bending(ground: Ground) -> list[Part]:
    """Features whose first-order effect changes most at random points around the unsteered one, with either sign."""
    few = ground.splits["candidates"].take(range(min(EXAMPLES, len(ground.splits["candidates"]))))
    options, generator = ground.options, torch.Generator().manual_seed(ground.options.seed)
    tables: Tables = {
        site: DirectionTable(torch.randn(PROBES, sae.d_in, generator=generator).to(sae.W_dec))
        for site, sae in ground.saes.items()
    }
    dose = options.dose[-1] / len(ground.sites)
    here = first_order(ground.model, ground.saes, few, cache=ground.cache)
    change = {site: torch.zeros_like(one.add) for site, one in here.items()}
    for probe in range(PROBES):
        at = SteeringEdit(tuple(Part(site, probe, dose) for site in ground.sites))
        there = first_order(ground.model, ground.saes, few, cache=ground.cache, at=at, tables=tables)
        for site, one in there.items():
            change[site] += (one.add - here[site].add).square()
    found = _top(ground, change, BENT)
    return [Part(site, row, sign) for site, row in found for sign in (1.0, -1.0)]


def _joined(ground: Ground, start: SteeringEdit, size: int) -> list[SteeringEdit]:
    """A beginning with each of the partners that the gradient proposes where it is steered to."""
    few = ground.splits["candidates"].take(range(min(EXAMPLES, len(ground.splits["candidates"]))))
    share = ground.options.dose[-1] / math.sqrt(size)
    there = _equal_shares(start.parts, share)
    found = first_order(ground.model, ground.saes, few, cache=ground.cache, at=there, tables=ground.tables)
    known = {(part.site, part.row) for part in start.parts}
    signs: dict[Site, FirstOrder] = found
    effects = {site: one.add.abs() for site, one in found.items()}
    partners = [at for at in _top(ground, effects, PARTNERS + len(known)) if at not in known][:PARTNERS]
    return [
        _equal_shares((*start.parts, Part(site, row, 1.0 if signs[site].add[row] > 0 else -1.0)), share)
        for site, row in partners
    ]


def _equal_shares(parts: Sequence[Part], share: float) -> SteeringEdit:
    return SteeringEdit(tuple(part._replace(dose=share if part.dose > 0 else -share) for part in parts))


def _top(ground: Ground, values: dict[Site, Float[Tensor, " n"]], count: int) -> list[tuple[Site, int]]:
    """The live features with the largest values over all sites."""
    places = [
        (float(values[site][i]), site, i)
        for site in ground.sites
        for i in _best_live(ground, site, values[site], count)
    ]
    return [(site, i) for _, site, i in sorted(places, key=lambda place: -place[0])[:count]]


def _best_live(ground: Ground, site: Site, values: Float[Tensor, " n"], count: int) -> list[int]:
    live = ground.tables[site].live_ids()
    return live[values[live].topk(min(count, len(live))).indices].tolist()


def _distinct(edits: Sequence[SteeringEdit]) -> list[SteeringEdit]:
    """Edits of which none is another at another dose, or in another order."""
    found: dict[frozenset[tuple[Site, int, bool]], SteeringEdit] = {}
    for edit in edits:
        found.setdefault(frozenset((p.site, p.row, p.dose > 0) for p in edit.parts), edit)
    return list(found.values())
