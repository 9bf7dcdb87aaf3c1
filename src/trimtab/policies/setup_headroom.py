"""The headroom of a training's own surroundings: its SAE, site, dose, unit and mask.

Where answers are one token every feature is tried; where they are longer, some of those that the mask allows are held
over the whole answer.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from trimtab.control.masks import PromptFirings
from trimtab.control.task_prompts import TaskPrompts, last_prompt_activations
from trimtab.policies.headroom import HeadroomTable, allowed_at_first, headroom_table
from trimtab.policies.headroom_by_decoding import DecodingPlan, headroom_by_decoding
from trimtab.policies.headroom_candidates import COUNT, CandidateRule, candidate_order, first_allowed
from trimtab.policies.setup import Setup
from trimtab.runs import Meter


def setup_headroom(
    setup: Setup, prompts: TaskPrompts, *, count: int = COUNT, masked: bool = True, seed: int | None = None
) -> HeadroomTable:
    """Try features with the training's own edit.

    Args:
        setup: of the training.
        prompts: items to try them on.
        count: features to hold where answers are longer than a token: the highest in delta-confidence among those
            allowed, or a draw where the SAE comes without statistics.
        masked: keep to the training's mask; otherwise everything is allowed.
        seed: of candidates and random directions; the training's if not given.

    Raises:
        NothingAllowedError: answers are longer than a token, and the mask allows nothing where they begin.
    """
    config, model, sae, site = setup.config, setup.model, setup.dictionary, setup.site
    seed = config.seed if seed is None else seed
    if prompts.max_new_tokens == 1:
        with Meter("trying features", len(prompts)) as meter:
            return headroom_table(
                model, sae, prompts, site=site, dose=config.dose, unit=config.unit,
                mask=setup.fresh_mask() if masked else None, seed=seed, progress=meter.advance,
            )  # fmt: skip
    rule: CandidateRule = "random" if sae.feature_stats is None else "top-confidence"
    order = candidate_order(model, sae, rule, site=site, seed=seed)
    allowed = allowed_by(setup, prompts) if masked else np.ones((len(prompts), sae.n_features), dtype=bool)
    kind = config.mask if masked else "none"
    candidates = first_allowed(order, min(count, sae.n_features), allowed, rule=rule, mask=kind, site=site)
    found = len(candidates.features)
    plan = DecodingPlan(len(prompts), found, found, 1, prompts.max_new_tokens)
    print(f"trimtab: headroom: {plan.describe()}", file=sys.stderr, flush=True)
    with Meter("decoding with features", plan.answers) as meter:
        table = headroom_by_decoding(
            model, sae, prompts, candidates, site=site, dose=config.dose, unit=config.unit, seed=seed,
            batch_size=config.batch_size, progress=meter.advance,
        )  # fmt: skip
    return table._replace(allowed=allowed[:, list(candidates.features)] if masked else None)


def allowed_by(setup: Setup, prompts: TaskPrompts) -> Bool[NDArray[np.bool_], "P n"]:
    """What the training's mask allows where answers begin. Nothing is left in the caches that training decodes with."""
    mask = replace(setup, firings=PromptFirings(setup.model, setup.site, setup.dictionary)).fresh_mask()
    return allowed_at_first(setup.model, prompts, mask, last_prompt_activations(setup.model, prompts, setup.site))
