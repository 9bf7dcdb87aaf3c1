"""The one choice that every way of steering goes through, all ways side by side: by exact effects, within a price.

All candidates are screened on some of the choice's examples, each at the dose that the budget about allows, from one
measurement of its price and the square law that divergence follows for small doses. The best of each way are tried on
all of them at the largest dose within the budget, found by measuring; the best of these at the grid's next smaller
dose, too, and what is strongest is taken. Without a budget it is the middle dose of the grid first, then all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from trimtab.control.dose_search import match_kls
from trimtab.finding.ground import Ground
from trimtab.finding.steering_edit import SteeringEdit

LEFT = 2
"""Candidates of each way that are tried on all examples."""
USED = 0.9
"""Share of the budget that is aimed at."""
TOLERANCE = 0.1
LEAST_SCALE = 1e-3
"""Of the dose that should cost the budget; a way of which less than this is too dear has no choice."""
_NONE = (-math.inf, math.inf)


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What a way of steering chose."""

    edit: SteeringEdit
    effects: Float[Tensor, " X"]
    """On the examples it was chosen on; too good, as the best of several."""
    kl: float
    """On neutral text for choosing, in nats per token."""
    tried: int
    """Candidates."""


def choose(ground: Ground, ways: Mapping[str, Sequence[SteeringEdit]]) -> dict[str, Choice]:
    """Choose an edit and its dose for each way.

    Args:
        ground: what is searched.
        ways: candidates of any dose; a way of which nothing is within the budget has no choice.
    """
    every = list(dict.fromkeys(edit for candidates in ways.values() for edit in candidates))
    if not every:
        return {}
    full = dict(zip(every, affordable(ground, every), strict=True))
    means = dict(zip(every, ground.effects("screening", list(full.values())).mean(1).tolist(), strict=True))
    # A removal has no dose that could be lowered: too dear, it would take the place of what is not.
    removals = [edit for edit in every if edit.operation == "ablate"]
    for edit in set(removals) - set(_affordable_removals(ground, removals)):
        del means[edit]
    left = {
        name: sorted((edit for edit in dict.fromkeys(candidates) if edit in means), key=lambda edit: -means[edit])[
            :LEFT
        ]
        for name, candidates in ways.items()
    }
    largest = _largest(ground, {edit: full[edit] for candidates in left.values() for edit in candidates})
    effects = _within(ground, list(largest.values()))
    best = {name: max(edits, key=lambda e: effects.get(largest[e], _NONE)[0]) for name, edits in left.items() if edits}
    free, doses = math.isinf(ground.options.most_kl), ground.options.dose
    others = {
        name: [edit.at_dose(dose) for dose in doses if free or dose < 0.9 * largest[edit].dose][0 if free else -1 :]
        for name, edit in best.items()
    }
    effects |= _within(ground, [edit for edits in others.values() for edit in edits])
    found: dict[str, Choice] = {}
    for name, edits in others.items():
        trials = [edit for edit in (largest[best[name]], *edits) if edit in effects]
        if trials:
            edit = max(trials, key=lambda trial: effects[trial][0])
            found[name] = Choice(
                edit=edit, effects=ground.effects("choice", [edit])[0], kl=effects[edit][1],
                tried=len(dict.fromkeys(ways[name])),
            )  # fmt: skip
    return found


def _within(ground: Ground, edits: Sequence[SteeringEdit]) -> dict[SteeringEdit, tuple[float, float]]:
    """Mean effects and prices of those edits that the budget allows."""
    if not edits:
        return {}
    prices = dict(zip(edits, ground.kl("choice", edits).mean(1).tolist(), strict=True))
    allowed = [edit for edit, kl in prices.items() if kl <= ground.options.most_kl]
    means = ground.effects("choice", allowed).mean(1).tolist() if allowed else []
    return {edit: (mean, prices[edit]) for edit, mean in zip(allowed, means, strict=True)}


def affordable(ground: Ground, edits: Sequence[SteeringEdit]) -> list[SteeringEdit]:
    """Edits at the doses that the budget about allows; at the middle one of the grid without a budget."""
    doses, most = ground.options.dose, ground.options.most_kl
    middle = [edit.at_dose(doses[(len(doses) - 1) // 2]) for edit in edits]
    if not edits or math.isinf(most):
        return middle
    kls = ground.kl("choice", middle).mean(1).tolist()
    return [
        edit.at_dose(min(edit.dose * math.sqrt(USED * most / max(kl, 1e-9)), doses[-1])) if edit.dose else edit
        for edit, kl in zip(middle, kls, strict=True)
    ]


def _affordable_removals(ground: Ground, removals: Sequence[SteeringEdit]) -> list[SteeringEdit]:
    if not removals or math.isinf(ground.options.most_kl):
        return list(removals)
    kls = ground.kl("choice", removals).mean(1).tolist()
    return [edit for edit, kl in zip(removals, kls, strict=True) if kl <= ground.options.most_kl]


def _largest(ground: Ground, full: Mapping[SteeringEdit, SteeringEdit]) -> dict[SteeringEdit, SteeringEdit]:
    """Each candidate at the largest dose that the budget allows, at most the grid's; removals as they are."""
    if math.isinf(ground.options.most_kl):
        return dict(full)
    dosed = [edit for edit in full if edit.operation == "add"]
    return {**full, **dict(zip(dosed, _lowered(ground, [full[edit] for edit in dosed]), strict=True))}


def _lowered(ground: Ground, edits: Sequence[SteeringEdit]) -> list[SteeringEdit]:
    """Edits at the largest dose that the budget allows, at most the grid's."""
    most, top = ground.options.most_kl, ground.options.dose[-1]

    def at(edit: SteeringEdit, scale: float) -> SteeringEdit:
        return edit.at_dose(min(scale * edit.dose, top))

    allowed = [0.0] * len(edits)

    def kl(scales: list[float]) -> list[float]:
        found = ground.kl("choice", [at(e, s) for e, s in zip(edits, scales, strict=True)]).mean(1).tolist()
        for i, (scale, value) in enumerate(zip(scales, found, strict=True)):
            allowed[i] = max(allowed[i], scale if value <= most else 0.0)
        return found

    found = match_kls(kl, [USED * most] * len(edits), tolerance=TOLERANCE, tries=4) if edits else []
    for i, match in enumerate(found):
        # KL may be steeper than the square law has it.
        scale = match.scale
        while not allowed[i] and scale > LEAST_SCALE:
            scale /= 2
            allowed[i] = scale if float(ground.kl("choice", [at(edits[i], scale)]).mean()) <= most else 0.0
    return [at(edit, scale or 1.0) for edit, scale in zip(edits, allowed, strict=True)]
