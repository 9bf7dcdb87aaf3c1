"""Headroom beside a training: the lines that its policy stands between, in the run's `headroom.json`."""

from __future__ import annotations

import json
import sys

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from trimtab.policies.episodes import Episodes
from trimtab.policies.headroom import HeadroomTable, allowed_at_first, headroom, headroom_table
from trimtab.policies.headroom_by_decoding import (
    PROMPTS_TOGETHER,
    DecodingPlan,
    headroom_by_decoding,
    last_prompt_activations,
)
from trimtab.policies.headroom_candidates import (
    COUNT,
    CandidateRule,
    NothingAllowedError,
    candidate_order,
    first_allowed,
)
from trimtab.policies.headroom_command import HeadroomResult
from trimtab.policies.masks import PromptFirings, build_mask
from trimtab.policies.setup import Setup
from trimtab.runs import Meter, Run, json_safe, write_json

HEADROOM_FILE = "headroom.json"


def training_headroom(setup: Setup, run: Run, validation: Episodes) -> tuple[str, ...]:
    """Measure headroom on the first validation items, unless the run holds it already.

    Where answers are longer than a token, the 48 allowed features highest in delta-confidence are held over them, or 48
    drawn at random where the SAE comes without statistics.

    Args:
        setup: of the training; its config says how many items (0: nothing is measured).
        run: open; gets `headroom.json`, as `trimtab policy headroom --out` writes it.
        validation: the training's validation items.

    Returns:
        What speaks against training here.

    Raises:
        UserError: the mask allows nothing where one-token answers are chosen, so that there is nothing to learn.
    """
    config = setup.config
    warnings = _mask_warnings(setup, validation)
    if not config.headroom_items:
        return warnings
    path = run.file(HEADROOM_FILE)
    if not path.exists():
        few = validation.take(range(min(config.headroom_items, len(validation))))
        try:
            table = _table(setup, few)
        except NothingAllowedError as error:
            return (*warnings, f"headroom was not measured: {error.why}")
        line = headroom(
            table, site=str(setup.site), dose=config.dose, unit=config.unit, mask=config.mask, seed=config.seed
        )
        result = HeadroomResult(task=setup.task.name, model=setup.model.name, split="validation", lines=(line,))
        write_json(path, json_safe(result.to_json()))
    lines = json.loads(path.read_text(encoding="utf-8"))["lines"]
    return tuple(dict.fromkeys([*warnings, *(warning for line in lines for warning in line["warnings"])]))


def _table(setup: Setup, few: Episodes) -> HeadroomTable:
    config, model, sae, site = setup.config, setup.model, setup.sae, setup.site
    if few.max_new_tokens == 1:
        with Meter("trying features", len(few)) as meter:
            return headroom_table(
                model, sae, few, site=site, dose=config.dose, unit=config.unit, mask=setup.mask(), seed=config.seed,
                progress=meter.advance,
            )  # fmt: skip
    rule: CandidateRule = "random" if sae.feature_stats is None else "top-confidence"
    order = candidate_order(model, sae, rule, site=site, seed=config.seed)
    allowed = _allowed(setup, few)
    candidates = first_allowed(order, min(COUNT, sae.n_features), allowed, rule=rule, mask=config.mask, site=site)
    count = len(candidates.features)
    plan = DecodingPlan(len(few), count, count, 1, few.max_new_tokens)
    print(f"trimtab: headroom before training: {plan.describe()}", file=sys.stderr, flush=True)
    with Meter("decoding with features", plan.answers) as meter:
        table = headroom_by_decoding(
            model, sae, few, candidates, site=site, dose=config.dose, unit=config.unit, seed=config.seed,
            batch_size=config.batch_size, progress=meter.advance,
        )  # fmt: skip
    return table._replace(allowed=allowed[:, list(candidates.features)])


def _mask_warnings(setup: Setup, validation: Episodes) -> tuple[str, ...]:
    """Whether the mask allows anything where answers begin; items are looked at until one says so."""
    kind = setup.config.mask
    if kind not in ("current", "accumulated"):  # the others are lists, which are never empty
        return ()
    for start in range(0, len(validation), PROMPTS_TOGETHER):
        few = validation.take(range(start, min(start + PROMPTS_TOGETHER, len(validation))))
        if _allowed(setup, few).any():
            return ()
    nothing = NothingAllowedError(kind, setup.site, len(validation))
    if validation.max_new_tokens == 1:
        raise nothing
    return (f"{nothing.what}: {nothing.why}",)


def _allowed(setup: Setup, few: Episodes) -> Bool[NDArray[np.bool_], "P n"]:
    """What the mask allows where answers begin. Nothing is left in the caches that training decodes with."""
    mask = build_mask(
        setup.config.mask,
        setup.sae,
        prompt_firings=PromptFirings(setup.model, setup.site, setup.sae),
        features=setup.mask_features or None,
    )
    return allowed_at_first(setup.model, few, mask, last_prompt_activations(setup.model, few, setup.site))
