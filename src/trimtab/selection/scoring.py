"""Scores of a dictionary's features by several criteria, in as few passes as they need.

Criteria that amplify by the same dose after the same prefix share one pass through the model, and one prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import Site
from trimtab.selection.criterion import (
    Criterion,
    EffectCriterion,
    GradientCriterion,
    PrefixCriterion,
    ScoringTarget,
    feature_stats,
)
from trimtab.selection.scorer import BATCH_SIZE, LastTokenScorer
from trimtab.steering.doses import Unit, coefficients


class Scores(NamedTuple):
    """One criterion's scores."""

    criterion: Criterion
    score: Float[Tensor, " n"]
    relative_dose: Float[Tensor, " n"] | None  # ‖Δ‖/‖x‖ where it was amplified, mean over prefixes


def score_features(
    target: ScoringTarget,
    site: Site | str,
    criteria: Sequence[Criterion],
    *,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], None] | None = None,
) -> list[Scores]:
    """Score features by each criterion.

    Args:
        target: the model, which is left as it was, the dictionary, whose width must be the site's, and its features.
        site: where features are amplified.
        criteria: see `registry.CRITERIA`.
        batch_size: features that go through the layers together, at most: fewer where they do not fit in memory.
        progress: called with the number of features whenever some have been scored; `passes` tells how many times all
            of them are.

    Returns:
        One entry per criterion, scores in the order of the target's features, on the CPU.

    Raises:
        UserError: statistics that a criterion needs are missing, a prefix gives no token, there is no memory for one
            feature, or a score is not finite.
    """
    model, dictionary, features = target.model, target.dictionary, target.features
    effects = [criterion for criterion in criteria if isinstance(criterion, PrefixCriterion)]
    reducers = {c: c.reducer(target) for c in effects if isinstance(c, EffectCriterion)}
    quantities = {c: c.quantity(target) for c in effects if isinstance(c, GradientCriterion)}
    totals = {criterion: torch.zeros(len(features)) for criterion in effects}
    doses = {criterion: torch.zeros(len(features)) for criterion in effects}
    for dose, unit, prefix in passes(criteria):
        mine = [c for c in effects if (c.dose, c.unit) == (dose, unit) and prefix in c.prefixes]
        scorer = LastTokenScorer(model, site, model.encode_text(prefix), batch_size=batch_size)
        m = None
        if unit == "max_activation":
            m = torch.as_tensor(feature_stats(dictionary, f"criterion {mine[0].name}").max_activation)[features.cpu()]
        x = scorer.continuation.x.float().cpu()
        strength = coefficients(unit, torch.full((1, len(features)), dose), x[None], None if m is None else m[None])[0]
        directions = dictionary.directions[features.to(dictionary.directions.device)]
        strength = strength.to(directions.device)
        found: dict[str, Tensor] = {}
        if exact := {c.label: reducers[c] for c in mine if c in reducers}:
            found = scorer.score(directions, strength, exact, progress=progress)
            batch_size = scorer.batch_size  # with what fits, if that is less
        elif progress is not None:
            progress(len(features))
        for criterion in mine:
            if criterion in quantities:
                gradient = scorer.gradient(quantities[criterion]).to(directions.device)
                found[criterion.label] = strength * (directions.float() @ gradient)
        relative = strength.abs().cpu() / x.norm()
        for criterion in mine:
            totals[criterion] += found[criterion.label].float().cpu() / len(criterion.prefixes)
            doses[criterion] += relative / len(criterion.prefixes)
    results = [
        Scores(criterion, totals[criterion], doses[criterion])
        if isinstance(criterion, PrefixCriterion)
        else Scores(criterion, criterion.scores(target), None)
        for criterion in criteria
    ]
    for result in results:
        _check_finite(result, features)
    return results


def passes(criteria: Sequence[Criterion]) -> list[tuple[float, Unit, str]]:
    """The doses, units and prefixes at which criteria amplify: all features go through the model once for each."""
    found: list[tuple[float, Unit, str]] = [
        (c.dose, c.unit, prefix) for c in criteria if isinstance(c, PrefixCriterion) for prefix in c.prefixes
    ]
    return list(dict.fromkeys(found))


def _check_finite(result: Scores, features: Int[Tensor, " n"]) -> None:
    if torch.isfinite(result.score).all():
        return
    why = "some of its scores are not finite"
    if result.relative_dose is not None:
        worst = int(features[result.relative_dose.nan_to_num(torch.inf).argmax()])
        why += f": amplified activations overflow, feature {worst}'s dose being the largest"
    raise UserError(f"criterion {result.criterion.label}", why, "use --dtype float32 or a smaller dose")
