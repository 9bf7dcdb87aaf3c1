"""Features of the mask `found`: those that a wish was found to need, or the task's own training items.

A policy adds features at one dose, so that only those count that help with the dose's sign.
"""

from __future__ import annotations

from pathlib import Path

from trimtab.dictionaries import SAE
from trimtab.errors import UserError
from trimtab.finding import TaskReward, first_order
from trimtab.finding.result import FoundFacts
from trimtab.lm import LanguageModel, Site
from trimtab.policies.config import PolicyConfig
from trimtab.runs import Meter, read_record, read_typed
from trimtab.runs.record import RECORD_NAME
from trimtab.steering import load
from trimtab.tasks import Task


def found_features(config: PolicyConfig, model: LanguageModel, sae: SAE, site: Site, task: Task) -> tuple[int, ...]:
    """The best features at a site, best first, at most as many as the config says.

    Args:
        config: names a saved steering or a run of `find`; without one the task's training items decide, by the first
            order of their reward.
        model, sae, site, task: of the policy.

    Raises:
        UserError: what is named holds none of this SAE's features that help with the dose's sign, or is damaged.
    """
    sign = 1.0 if config.dose >= 0 else -1.0
    if config.found is None:
        wish = TaskReward(task=task, items=config.train_items or TaskReward.items, seed=config.seed)
        examples = wish.examples(model)
        with Meter("finding features for the task", len(examples)) as meter:
            effect = sign * first_order(model, {site: sae}, examples, progress=meter.advance)[site].certainty
        found = [i for i in effect.argsort(descending=True).tolist() if effect[i] > 0]
    else:
        found = _named(config.found, sae, site, sign)
    if not found:
        where = "the task's training items" if config.found is None else str(config.found)
        why = f"none of the SAE's features at {site} helps with {'a positive' if sign > 0 else 'a negative'} dose"
        raise UserError(f"mask found of {where}", why, "give another --found, or the dose the other sign")
    return tuple(found[: config.mask_features])


def _named(path: Path, sae: SAE, site: Site, sign: float) -> list[int]:
    """Features of a run of `find` that its gradient says help, the most certain first; or those of a saved steering."""
    if (path / RECORD_NAME).exists():
        record = read_record(path)
        if record["command"] != "find" or not record["results"]:
            raise UserError(f"run {path}", "it is no finished run of find", "name one, or a saved steering")
        hashes = [value for name, value in record["hashes"].items() if name.endswith(str(site))]
        if sae.fingerprint not in hashes:
            raise UserError(f"run {path}", f"it did not search this SAE at {site}", "give the SAE that was searched")
        facts = read_typed(FoundFacts, record["results"], f"run {path}")
        if not facts.yes:
            why = "its answer is no: no feature is shown to serve the wish"
            raise UserError(f"run {path}", why, "name another one, or leave --found out for the task's own items")
        (ranked,) = [row for row in facts.ranked if row.site == str(site)]
        certainty = dict(zip(ranked.feature, ranked.certainty, strict=True))
        return [i for i in sorted(certainty, key=lambda i: -sign * certainty[i]) if sign * certainty[i] > 0]
    steering = load(path)
    parts = [part for part in steering.parts if part.site == str(site) and part.sae_hash == sae.fingerprint]
    if not parts:
        raise UserError(f"steering {path}", f"it has no feature of this SAE at {site}", "give its SAE (--sae)")
    if steering.operation != "add":
        raise UserError(f"steering {path}", f"its operation is {steering.operation}", "a policy adds features")
    pairs = [(dose, i) for part in parts for i, dose in zip(part.feature, part.dose, strict=True)]
    return [i for dose, i in sorted(pairs, key=lambda pair: -abs(pair[0])) if dose * sign > 0]
