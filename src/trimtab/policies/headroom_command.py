"""`trimtab policy headroom`: the lines of `policies.headroom` for several SAEs, doses and masks, as a table."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray
from rich.table import Table

from trimtab.control.masks import MaskKind, PromptFirings, build_mask
from trimtab.control.task_prompts import TaskPrompts, last_prompt_activations
from trimtab.dictionaries import SAE, load_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, ModelConfig, PromptCache
from trimtab.policies.files import JUDGE_FILE
from trimtab.policies.headroom import Headroom, HeadroomTable, allowed_at_first, headroom, headroom_table
from trimtab.policies.headroom_by_decoding import (
    BATCH_SIZE,
    DecodingPlan,
    headroom_by_decoding,
)
from trimtab.policies.headroom_candidates import (
    COUNT,
    CandidateRule,
    Candidates,
    NothingAllowedError,
    candidate_order,
    check_count,
    first_allowed,
)
from trimtab.runs import Meter, check_choices, check_least, json_safe, write_json
from trimtab.runs.tables import Column, result_table
from trimtab.selection.ranking import dictionary_site
from trimtab.steering import Unit, check_doses
from trimtab.tasks import TaskConfig


@dataclass(frozen=True, kw_only=True)
class HeadroomConfig(TaskConfig, ModelConfig):
    """Measure what an edit could gain on a task, by SAE, dose and mask, before any policy is trained."""

    sae: tuple[str, ...] = ("default",)
    """SAEs, of one layer or of several: directories or shipped names."""
    site: str | None = None
    """Where to steer, for SAEs that do not name the site they read."""
    dose: tuple[float, ...] = (0.5, 1.0)
    """Doses of the edit, in `unit`."""
    unit: Unit = "relative"
    """What a dose is a multiple of."""
    masks: tuple[MaskKind, ...] = ("none", "current", "accumulated", "top-confidence")
    """Masks to compare."""
    mask_features: int = 256
    """Features of the mask `top-confidence`."""
    split: str = "train"
    """Split of the task that items are from."""
    items: int = 32
    """Items of the split to try, the same ones every time."""
    features: int | None = None
    """Features to try for each mask, where answers are longer than one token; 48 unless given, or all if fewer."""
    candidates: CandidateRule = "top-confidence"
    """How those features are chosen among the ones that a mask allows: `top-confidence` for the highest in
    delta-confidence, `random` for a draw among those that ever fired."""
    token_limit: int = 1_000_000
    """Where answers are longer than one token, decode no more tokens than this: what could need more is refused."""
    batch_size: int = BATCH_SIZE
    """Rows decoded together, where answers are longer than one token."""
    seed: int = 0
    """Of random directions, candidates, folds and bootstrap."""
    out: Path | None = None
    """Write the result to this JSON file as well, and the replies of a judge behind an endpoint beside it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_doses(list(self.dose))
        check_choices(self)
        enough = {"items": self.items >= 2, "sae": bool(self.sae), "dose": bool(self.dose), "masks": bool(self.masks)}
        for name, ok in enough.items():
            if not ok:
                raise UserError(f"{name} {getattr(self, name)}", "there is too little to compare", "give more")
        check_least(self, 1, "mask_features", "token_limit", "batch_size")
        if self.features is not None:
            check_count(self.features)

    @property
    def transcript(self) -> Path | None:
        """File beside `out` that keeps the replies of a judge behind an endpoint."""
        return None if self.out is None else self.out.with_suffix(f".{JUDGE_FILE}")


@dataclass(frozen=True, kw_only=True)
class HeadroomResult:
    """Lines for every SAE, dose and mask."""

    task: str
    model: str
    split: str
    lines: tuple[Headroom, ...]
    task_option: tuple[str, ...] = ()
    judge: str | None = None
    """As given; None for the task's own default."""

    def render(self) -> Table:
        """One row for each SAE, dose and mask."""
        first = self.lines[0]
        every = first.scheme == "every answer token"
        title = f"headroom of {self.task} on {self.model}: mean reward of {first.items} items ({self.split}), "
        caption = (
            "In brackets: how many of those tried the mask allows, on average. random: expected best of as many random "
            "directions as the mask allows features of the item. static: one feature for all, cross-fitted. readout: "
            "ridge regression from the activation picks, cross-fitted. 95% intervals over items."
        )
        sites = {line.site for line in self.lines}
        if len(sites) == 1:
            title += f"{first.site}, "
        columns = [
            *[Column("site", "site", whole=True)] * (len(sites) > 1),
            Column("dose", "dose", "g"),
            Column("mask", lambda line: f"{line.mask} ({line.allowed_per_item:,.0f})"),
            Column("unsteered", "unsteered", ".2f"),
            Column("ceiling", "ceiling", ".2f"),
            Column("random", "random_ceiling", ".2f"),
            Column("static", "static", ".2f"),
            Column("most active", "most_active", ".2f"),
            Column("readout", "readout", ".2f"),
        ]
        caption = f"ceiling: best allowed feature of each item{_tried(self.lines)}. {caption}"
        warnings = dict.fromkeys(warning for line in self.lines for warning in _located(line))
        return result_table(
            columns,
            self.lines,
            title=title + ("one feature held over the whole answer" if every else "one edit at the last prompt token"),
            caption="\n".join([caption, *warnings]),
        )

    def to_json(self) -> dict[str, Any]:
        """The lines as plain values."""
        derived = [
            {"over_static": line.over_static, "ceiling_is_lower_bound": line.ceiling_is_lower_bound,
             "warnings": line.warnings()}
            for line in self.lines
        ]  # fmt: skip
        plain = json_safe(self)
        return plain | {"lines": [a | json_safe(b) for a, b in zip(plain["lines"], derived, strict=True)]}


def run_headroom(config: HeadroomConfig) -> HeadroomResult:
    """Load what the config names and try features.

    Raises:
        UserError: anything that the user named is wrong, a mask allows nothing, or too much would be decoded.
    """
    task = config.read_task()
    if task is not None:
        task.sample(config.split, config.items)  # names a wrong split before the model is loaded
    model = config.load_model()
    task = task or config.load_task(model.tokenizer)
    saes = [load_dictionary(name, model=model, device=model.device) for name in config.sae]
    prompts = TaskPrompts.of(
        model, task, task.sample(config.split, config.items), options_only=config.options_only,
        max_new_tokens=config.max_new_tokens,
    )  # fmt: skip
    if prompts.max_new_tokens == 1 and config.features is not None:
        raise UserError(
            f"features {config.features}", f"answers of {task.name} are one token, and every feature is tried",
            "leave it out",
        )  # fmt: skip
    cache = PromptCache(model)
    places = [_place(model, sae, prompts, config, cache) for sae in saes]
    tables = _by_decoding if prompts.max_new_tokens > 1 else _through_the_prefix
    result = HeadroomResult(
        task=task.name, model=model.name, split=config.split, lines=tables(model, places, prompts, config, cache),
        task_option=config.task_option, judge=config.judge,
    )  # fmt: skip
    if config.out is not None:
        write_json(config.out, result.to_json())
    return result


class _Place(NamedTuple):
    """An SAE at its site, with what each mask allows at the items' last prompt tokens."""

    sae: SAE
    site: str
    allowed: dict[MaskKind, Bool[NDArray[np.bool_], "P n"]]
    candidates: dict[MaskKind, Candidates]
    """Empty where every feature is tried."""

    @property
    def union(self) -> Candidates:
        """All candidates, each once."""
        found = tuple(self.candidates.values())
        return found[0]._replace(features=tuple(dict.fromkeys(f for one in found for f in one.features)))

    @property
    def randoms(self) -> int:
        """Random directions that the mask with most candidates asks for."""
        return max(len(one.features) for one in self.candidates.values())


def _place(model: LanguageModel, sae: SAE, prompts: TaskPrompts, config: HeadroomConfig, cache: PromptCache) -> _Place:
    site = str(dictionary_site(model, sae, config.site))
    x = last_prompt_activations(model, prompts, site, cache)
    firings = PromptFirings(model, site, sae)
    top: list[int] = []
    if "top-confidence" in config.masks:
        top = candidate_order(model, sae, "top-confidence", site=site)
    allowed = {}
    for mask in config.masks:
        kept = build_mask(mask, sae, prompt_firings=firings, features=top[: config.mask_features])
        allowed[mask] = allowed_at_first(model, prompts, kept, x)
        if not allowed[mask].any():
            raise NothingAllowedError(mask, site, len(prompts))
    candidates = {}
    if prompts.max_new_tokens > 1:
        count = min(COUNT, sae.n_features) if config.features is None else config.features
        order = top
        if config.candidates == "random" or not top:
            order = candidate_order(model, sae, config.candidates, site=site, seed=config.seed)
        candidates = {
            mask: first_allowed(order, count, where, rule=config.candidates, mask=mask, site=site)
            for mask, where in allowed.items()
        }
    return _Place(sae, site, allowed, candidates)


def _through_the_prefix(
    model: LanguageModel, places: list[_Place], prompts: TaskPrompts, config: HeadroomConfig, cache: PromptCache
) -> tuple[Headroom, ...]:
    del cache
    lines: list[Headroom] = []
    with Meter("trying features", len(places) * len(config.dose) * len(prompts)) as meter:
        for place in places:
            for dose in config.dose:
                table = headroom_table(
                    model, place.sae, prompts, site=place.site, dose=dose, unit=config.unit, seed=config.seed,
                    progress=meter.advance,
                )  # fmt: skip
                lines += [_line(table, place, mask, dose, config) for mask in config.masks]
    return tuple(lines)


def _by_decoding(
    model: LanguageModel, places: list[_Place], prompts: TaskPrompts, config: HeadroomConfig, cache: PromptCache
) -> tuple[Headroom, ...]:
    """Candidates of all masks are decoded once per dose, and each mask's lines are drawn from its own."""
    plans = [
        DecodingPlan(len(prompts), len(place.union.features), place.randoms, len(config.dose), prompts.max_new_tokens)
        for place in places
    ]
    total = sum(plan.tokens for plan in plans)
    if total > config.token_limit:
        raise UserError(
            f"headroom of {prompts.task.name}",
            f"up to {total:,} tokens would be decoded, more than the limit of {config.token_limit:,}",
            "lower --items, --features, --max-new-tokens or the number of doses and masks, or raise --token-limit",
        )
    for place, plan in zip(places, plans, strict=True):
        print(f"trimtab: headroom at {place.site}: {plan.describe()}", file=sys.stderr, flush=True)
    lines: list[Headroom] = []
    with Meter("decoding with features", sum(plan.answers for plan in plans)) as meter:
        for place in places:
            for dose in config.dose:
                table = headroom_by_decoding(
                    model, place.sae, prompts, place.union, site=place.site, dose=dose, unit=config.unit,
                    randoms=place.randoms, seed=config.seed, batch_size=config.batch_size, prompt_cache=cache,
                    progress=meter.advance,
                )  # fmt: skip
                lines += [
                    _line(table.under(place.candidates[mask]), place, mask, dose, config) for mask in config.masks
                ]
    return tuple(lines)


def _line(table: HeadroomTable, place: _Place, mask: MaskKind, dose: float, config: HeadroomConfig) -> Headroom:
    allowed = place.allowed[mask]
    if table.candidates is not None:
        allowed = allowed[:, list(table.candidates.features)]
    return headroom(
        table._replace(allowed=allowed), site=place.site, dose=dose, unit=config.unit, mask=mask, seed=config.seed
    )


def _tried(lines: tuple[Headroom, ...]) -> str:
    """Which features the ceilings are over, where not all were tried."""
    few = [line for line in lines if line.ceiling_is_lower_bound]
    if not few:
        return ""
    counts = sorted({line.features for line in few})
    tried = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f" among {tried} tried of {few[0].of_features:,} (candidates: {few[0].candidates}), a lower bound on the "
        "ceiling over all"
    )


def _located(line: Headroom) -> list[str]:
    return [f"{line.site}, dose {line.dose:g}, mask {line.mask}: {warning}" for warning in line.warnings()]
