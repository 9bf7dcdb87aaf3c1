"""Other ways to choose a direction, each as candidates for the one choice: what people do today."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.control.arms.vector import add_everywhere
from trimtab.errors import UserError
from trimtab.finding.first_order import GRADIENT_WEIGHT
from trimtab.finding.ground import Ground
from trimtab.finding.passes import answer_log_probs, batches, run
from trimtab.finding.shortlist import best_features
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.lm import Site, edited
from trimtab.selection import DeltaConfidence, OutputScore, rank_by

STEPS, BATCH = 12, 4
"""Of a learned vector: steps of Adam, and examples of each."""
READERS = 50
"""Features that fire most differently, among which a ranking chooses."""
CRITERIA = {"delta-confidence": DeltaConfidence, "output-score": OutputScore}


def by_activation_difference(ground: Ground) -> list[SteeringEdit]:
    """The features that fire most differently on wanted and unwanted answers, added or subtracted accordingly.

    Raises:
        UserError: there are no answers of one kind.
    """
    return _readers(ground)[: ground.options.tried]


def by_criterion(ground: Ground, name: str) -> list[SteeringEdit]:
    """The features of the highest delta-confidence or output score among those that fire most differently.

    Neither criterion looks at the wish, so that they are asked which features that read it also write anything, as in
    Arad et al. 2025 (arXiv 2505.20063). Without statistics of an SAE features are amplified by the largest dose.

    Raises:
        UserError: there are no answers of one kind.
    """
    readers = _readers(ground)[:READERS]
    scores: dict[tuple[Site, int], float] = {}
    for site, sae in ground.saes.items():
        ids = [edit.parts[0].row for edit in readers if edit.parts[0].site == site]
        if ids:
            dosed = {} if sae.feature_stats is not None else {"dose": ground.options.dose[-1], "unit": "relative"}
            (table,) = rank_by(
                ground.model, sae, [CRITERIA[name](**dosed)], site=site, features=ids, top_tokens=1,
                progress=ground.meter.advance,
            )  # fmt: skip
            strength = np.abs(table.score) if table.signed else table.score
            scores.update({(site, int(i)): float(v) for i, v in zip(table.feature, strength, strict=True)})
    return sorted(readers, key=lambda edit: -scores.get(edit.parts[0][:2], -np.inf))[: ground.options.tried]


def _readers(ground: Ground) -> list[SteeringEdit]:
    if any(bool(one.reads.isnan().any()) for one in ground.first_order.values()):
        raise UserError("activation difference", "all examples have answers of one kind", "leave it out")
    found = best_features(ground, lambda one: one.reads.abs(), max(READERS, ground.options.tried))
    if not found:
        raise UserError("activation difference", "no feature fires on the answers", "leave it out")
    signs = {site: one.reads.sign() for site, one in ground.first_order.items()}
    return [SteeringEdit((Part(site, i, float(signs[site][i])),)) for site, i in found]


def mean_difference(ground: Ground) -> list[SteeringEdit]:
    """At each site the vector from the mean activation on unwanted answers to that on wanted ones.

    Raises:
        UserError: there are no answers of one kind, or no difference.
    """
    vectors = {site: one.difference for site, one in ground.first_order.items()}
    if any(not bool(torch.isfinite(vector).all()) or not bool(vector.any()) for vector in vectors.values()):
        raise UserError("mean difference", "all examples have answers of one kind, or the same ones", "leave it out")
    return [SteeringEdit((ground.add_vector(site, vector),)) for site, vector in vectors.items()]


def learned_vector(ground: Ground) -> list[SteeringEdit]:
    """A vector that is trained on the candidates' examples at the middle dose, and the mean gradient that it is trained
    from; where this gradient is longest."""
    doses = ground.options.dose
    site = max(ground.sites, key=lambda at: float(ground.first_order[at].gradient.norm()))
    start = ground.first_order[site].gradient
    vectors = start, learn(ground, site, doses[(len(doses) - 1) // 2], start)
    return [SteeringEdit((ground.add_vector(site, vector),)) for vector in vectors]


def learn(ground: Ground, site: Site, dose: float, start: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Adam on the direction of a vector of a relative dose, by the mean score of examples."""
    exact, examples = ground.exact, ground.splits["candidates"]
    model = exact.model
    vector = (start / start.norm().clamp_min(1e-30)).to(model.device).float().requires_grad_()
    optimiser = torch.optim.Adam([vector], lr=0.25 / len(vector) ** 0.5)
    order = np.random.default_rng([ground.options.seed, STEPS, BATCH])
    for _ in range(STEPS):
        part = examples.take(order.choice(len(examples), min(BATCH, len(examples)), replace=False).tolist())
        answered, logp = part.answered, dict[int, Tensor]()
        with torch.enable_grad():
            for rows in batches(model, answered, GRADIENT_WEIGHT):
                under = edited(model, {site: lambda x: add_everywhere(x, vector, dose)})
                logits = run(model, [answered[i] for i in rows], exact.cache, under)
                values = answer_log_probs(logits, [answered[i].answer for i in rows]).sum(-1)
                logp |= dict(zip(rows, values, strict=True))
            loss = -part.scores(torch.stack([logp[i] for i in range(len(answered))])).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ground.meter.advance(len(answered))
    return vector.detach()


WAYS: dict[str, Callable[[Ground], list[SteeringEdit]]] = {
    "activation-difference": by_activation_difference,
    **{name: partial(by_criterion, name=name) for name in CRITERIA},
    "mean-difference": mean_difference,
    "learned-vector": learned_vector,
}
"""Candidates of each; what is random and prompting are apart."""
