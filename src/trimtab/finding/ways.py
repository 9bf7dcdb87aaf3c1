"""Other ways to choose a direction, each as candidates for the one choice: what people do today, and what is random."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.control.arms.vector import add_everywhere
from trimtab.errors import UserError
from trimtab.finding.ground import Ground
from trimtab.finding.passes import answer_log_probs, run
from trimtab.finding.steering_edit import Part, SteeringEdit, Tables
from trimtab.lm import RowDelta, Site, edited
from trimtab.selection import DeltaConfidence, FeatureTable, OutputScore, rank_by
from trimtab.steering import DirectionTable

STEPS, BATCH = 12, 4
"""Of a learned vector: steps of Adam, and examples of each."""
RANDOM = 1009
"""Key of the draw of random features, apart from others."""


def random_features(ground: Ground) -> list[SteeringEdit]:
    """Live features at random, of random signs, as many as every way tries."""
    rng = np.random.default_rng([ground.options.seed, RANDOM])
    live = [(site, i) for site in ground.sites for i in ground.tables[site].live_ids().tolist()]
    picked = rng.choice(len(live), min(ground.options.tried, len(live)), replace=False)
    chosen = [live[i] for i in picked]
    return [SteeringEdit((Part(site, row, float(rng.choice([-1.0, 1.0]))),)) for site, row in chosen]


def by_activation_difference(ground: Ground) -> list[SteeringEdit]:
    """The features that fire most differently on wanted and unwanted answers.

    Raises:
        UserError: there are no answers of one kind.
    """
    rows = [(float(one.reads[i]), site, i) for site, one in ground.first_order.items() for i in range(len(one.reads))]
    if any(np.isnan(value) for value, *_ in rows):
        raise UserError("activation difference", "all examples have answers of one kind", "leave it out")
    rows.sort(key=lambda row: -abs(row[0]))
    return [SteeringEdit((Part(site, i, 1.0 if value > 0 else -1.0),)) for value, site, i in rows[: _tried(ground)]]


def rankings(ground: Ground) -> dict[Site, list[FeatureTable]]:
    """Delta-confidence and output score of every feature of each SAE, from the same passes.

    They ask for nothing of the wish. Without statistics of the SAE features are amplified by the largest dose.
    """
    found: dict[Site, list[FeatureTable]] = {}
    for site, sae in ground.saes.items():
        dosed = {} if sae.feature_stats is not None else {"dose": ground.options.dose[-1], "unit": "relative"}
        criteria = DeltaConfidence(**dosed), OutputScore(**dosed)  # type: ignore[arg-type]
        found[site] = rank_by(ground.model, sae, criteria, site=site, top_tokens=1, progress=ground.meter.advance)
    return found


def by_ranking(ground: Ground, ranked: dict[Site, list[FeatureTable]], which: int) -> list[SteeringEdit]:
    """The features at the top of a ranking, of a signed one at both ends, amplified."""
    rows: list[tuple[float, Site, int]] = []
    for site, tables in ranked.items():
        table = tables[which]
        strength = np.abs(table.score) if table.signed else table.score
        rows += [(float(value), site, int(i)) for value, i in zip(strength, table.feature, strict=True)]
    rows.sort(key=lambda row: -row[0])
    return [SteeringEdit((Part(site, i, 1.0),)) for _, site, i in rows[: _tried(ground)]]


def mean_difference(ground: Ground) -> tuple[list[SteeringEdit], Tables]:
    """At each site the vector from the mean activation on unwanted answers to that on wanted ones.

    Raises:
        UserError: there are no answers of one kind, or no difference.
    """
    vectors = {site: one.difference for site, one in ground.first_order.items()}
    if any(not bool(torch.isfinite(vector).all()) or not bool(vector.any()) for vector in vectors.values()):
        raise UserError("mean difference", "all examples have answers of one kind, or the same ones", "leave it out")
    return _of_vectors(ground, vectors)


def learned_vector(ground: Ground, site: Site) -> tuple[list[SteeringEdit], Tables]:
    """A vector that is trained on the candidates' examples at the middle dose, from the mean gradient on."""
    doses = ground.options.dose
    vector = learn(ground, site, doses[(len(doses) - 1) // 2], ground.first_order[site].gradient)
    return _of_vectors(ground, {site: vector})


def learn(ground: Ground, site: Site, dose: float, start: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Adam on the direction of a vector of a relative dose, by the mean score of examples."""
    model, examples = ground.model, ground.splits["candidates"]
    vector = (start / start.norm().clamp_min(1e-30)).to(model.device).float().requires_grad_()
    optimiser = torch.optim.Adam([vector], lr=0.25 / len(vector) ** 0.5)
    order = np.random.default_rng([ground.options.seed, RANDOM, 1])
    for _ in range(STEPS):
        part = examples.take(order.choice(len(examples), min(BATCH, len(examples)), replace=False).tolist())
        answered = part.answered
        several = [i for i, one in enumerate(answered) if len(one.prompt) > 1]
        logp: list[Tensor] = [torch.empty(0)] * len(answered)
        with torch.enable_grad():
            for rows in (several, [i for i in range(len(answered)) if i not in several]):
                if not rows:
                    continue
                under = edited(model, {site: _adding(vector, dose)})
                logits = run(model, [answered[i] for i in rows], ground.cache, under)
                values = answer_log_probs(logits, [answered[i].answer for i in rows]).sum(-1)
                for i, value in zip(rows, values, strict=True):
                    logp[i] = value
            loss = -part.scores(torch.stack(logp)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ground.meter.advance(len(answered))
    return vector.detach()


def _adding(vector: Float[Tensor, " d"], dose: float) -> Callable[[Tensor], RowDelta]:
    return lambda x: add_everywhere(x, vector, dose)


def _of_vectors(ground: Ground, vectors: dict[Site, Float[Tensor, " d"]]) -> tuple[list[SteeringEdit], Tables]:
    tables = {site: DirectionTable(vector[None].to(ground.model.device)) for site, vector in vectors.items()}
    return [SteeringEdit((Part(site, 0, 1.0),)) for site in tables], tables


def _tried(ground: Ground) -> int:
    return ground.options.tried
