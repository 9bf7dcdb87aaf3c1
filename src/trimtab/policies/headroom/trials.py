"""What headroom tries: a setting's features on a task's items, under one mask or several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from trimtab.control.masks import MaskKind
from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts, last_prompt_activations
from trimtab.errors import UserError
from trimtab.lm import DecodeStart, PromptCache
from trimtab.policies.headroom.candidates import COUNT, CandidateRule, TriedFeatures, candidate_order, first_allowed
from trimtab.policies.headroom.table import HeadroomTable, Progress, headroom_table
from trimtab.runs import Meter


class Trials(NamedTuple):
    """What each mask allows where answers begin, and which features are tried."""

    setting: Setting
    prompts: TaskPrompts
    x: Float[np.ndarray, "P d"]
    """Activations at the items' last prompt tokens."""
    allowed: dict[MaskKind, Bool[np.ndarray, "P n"]]
    candidates: dict[MaskKind, TriedFeatures]
    """Every feature where answers are one token."""

    @classmethod
    def of(
        cls,
        setting: Setting,
        prompts: TaskPrompts,
        masks: Sequence[MaskKind] = (),
        *,
        rule: CandidateRule = "top-confidence",
        count: int | None = None,
        mask_features: int = 0,
    ) -> Trials:
        """Find what masks allow and choose candidates.

        Args:
            setting: model, dictionary and site.
            prompts: items to try features on.
            masks: the setting's own if none is named.
            rule: how candidates are chosen where answers are longer than a token.
            count: how many for each mask; 48 if not given, or all if there are fewer.
            mask_features: how many the mask `top-confidence` allows, if the setting does not name them.

        Raises:
            UserError: see `candidate_order` and `first_allowed`.
        """
        setting = replace(setting, prompt_cache=setting.prompt_cache or PromptCache(setting.model))
        x = last_prompt_activations(setting.model, prompts, setting.needed_site(), setting.prompt_cache)
        kinds, order = masks or (setting.mask,), list[int]()
        if mask_features and "top-confidence" in kinds:
            order = candidate_order(setting, "top-confidence")
            setting = replace(setting, mask_features=tuple(order[:mask_features]))
        found = cls(setting, prompts, x, {}, {})
        every, site = TriedFeatures.all(setting.needed_dictionary().n_features), str(setting.site)
        if prompts.max_new_tokens > 1 and (rule == "random" or not order):
            order = candidate_order(setting, rule)
        for mask in kinds:
            where = found.allowed[mask] = allowed_at_first(replace(setting, mask=mask), prompts, x)
            found.candidates[mask] = every
            if prompts.max_new_tokens > 1:
                found.candidates[mask] = first_allowed(order, count, where, rule=rule, mask=mask, site=site)
        return found

    @property
    def tried(self) -> tuple[int, ...]:
        """Features that any mask has tried, each once."""
        return tuple(dict.fromkeys(feature for one in self.candidates.values() for feature in one.features))

    @property
    def randoms(self) -> int:
        """Random directions that stand beside them: as many as the mask with most candidates has."""
        return max(len(one.features) for one in self.candidates.values())

    def answers(self, doses: int) -> int:
        """Rows decoded where answers are longer than a token."""
        return len(self.prompts) * doses * (1 + len(self.tried) + self.randoms)

    def describe(self, doses: int) -> str:
        """How much is decoded, at most, in one line."""
        answers, length = self.answers(doses), self.prompts.max_new_tokens
        return (
            f"up to {answers * length:,} tokens will be decoded: {answers:,} answers of up to {length} tokens "
            f"({len(self.prompts)} items without an edit, with {len(self.tried)} features and with {self.randoms} "
            f"random directions, at {doses} dose{'s' * (doses != 1)})"
        )

    def tables(self, progress: Progress | None = None) -> dict[MaskKind, HeadroomTable]:
        """Try all candidates at the setting's dose, and draw each mask's table from its own."""
        candidates = next(iter(self.candidates.values()))._replace(features=self.tried)
        whole = headroom_table(
            self.setting, self.prompts, candidates, randoms=self.randoms, x=self.x, progress=progress
        )
        return {mask: whole.under(one, self.allowed[mask]) for mask, one in self.candidates.items()}


def allowed_at_first(
    setting: Setting, prompts: TaskPrompts, x: Float[np.ndarray, "P d"] | None = None
) -> Bool[np.ndarray, "P n"]:
    """What the setting's mask allows at the first decision of each item, whose activations may be known."""
    model, mask = setting.model, setting.fresh_mask()
    if x is None:
        x = last_prompt_activations(model, prompts, setting.needed_site())
    rows = torch.arange(len(prompts), device=model.device)
    mask.start(DecodeStart([list(p) for p in prompts.ids], rows, 1, model.device))
    return mask.allowed(torch.from_numpy(x).to(model.device), rows, torch.zeros_like(rows)).cpu().numpy()


def try_features(
    trials: Sequence[Trials], doses: Sequence[float], *, token_limit: int | None = None
) -> list[tuple[Setting, HeadroomTable]]:
    """Tables for every trial, dose and mask, each with the setting that it is for.

    Args:
        trials: of one task's items, at one site or several.
        doses: of each edit.
        token_limit: decode no more tokens than this.

    Raises:
        UserError: more tokens could be decoded than the limit allows, or see `headroom_table`.
    """
    prompts = trials[0].prompts
    if prompts.max_new_tokens > 1:
        total = sum(one.answers(len(doses)) for one in trials) * prompts.max_new_tokens
        if token_limit is not None and total > token_limit:
            raise UserError(
                f"headroom of {prompts.task.name}",
                f"up to {total:,} tokens would be decoded, more than the limit of {token_limit:,}",
                "lower --items, --n-candidates, --max-new-tokens, --dose or --mask, or raise --token-limit",
            )
        for one in trials:
            print(f"trimtab: headroom at {one.setting.site}: {one.describe(len(doses))}", file=sys.stderr, flush=True)
    found: list[tuple[Setting, HeadroomTable]] = []
    with Meter("trying features", len(trials) * len(doses) * len(prompts)) as meter:
        for one in trials:
            for setting in (replace(one.setting, dose=dose) for dose in doses):
                tables = one._replace(setting=setting).tables(meter.advance)
                found += [(replace(setting, mask=mask), table) for mask, table in tables.items()]
    return found


def own_headroom(setting: Setting, prompts: TaskPrompts, *, count: int = COUNT) -> HeadroomTable:
    """Try features with a setting's own edit and mask.

    Args:
        setting: as it is trained or compared with; its seed is that of candidates and random directions.
        prompts: items to try them on.
        count: features to hold where answers are longer than a token: the highest in delta-confidence among those
            allowed, or a draw where the dictionary comes without statistics.

    Raises:
        NothingAllowedError: answers are longer than a token, and the mask allows nothing where they begin.
    """
    dictionary = setting.needed_dictionary()
    rule: CandidateRule = "random" if dictionary.feature_stats is None else "top-confidence"
    trials = Trials.of(setting.with_own_caches(), prompts, rule=rule, count=min(count, dictionary.n_features))
    ((_, table),) = try_features([trials], [setting.dose])
    return table
