"""Ways of control beside flags, on the original model: what each chooses on validation, and how it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor

from trimtab.control import Answers, ItemSet
from trimtab.control.arms.prompting import best_instruction, instructed
from trimtab.control.arms.static import best_static
from trimtab.lm import LanguageModel, Site
from trimtab.steering import VectorSource

FIRST_SHARE, LEFT = 3, 3
"""All candidates are tried on one in so many validation prompts, and so many of them, the best, on all."""


class Way(NamedTuple):
    """A way of control that was chosen on validation."""

    answer: Callable[[ItemSet, float], Answers]
    """Answers items, its dose multiplied by a number; an instruction has none."""
    chosen: Mapping[str, Any]
    """How it was chosen; `reward` is its mean on validation, the largest of several, and so too good."""


def best_direction(items: ItemSet, vectors: Mapping[Site, Tensor], doses: Sequence[float]) -> Way:
    """A direction that is added at each decision: at the best site and dose.

    All are tried on some items, the best few on all, with two texts each. Ties go to the smaller dose.

    Args:
        items: of validation.
        vectors: the direction at each site.
        doses: to try, as multiples of ‖x‖.
    """
    tried = [(dose, site) for dose in sorted(doses) for site in vectors]

    def source(pair: tuple[float, Site], scale: float = 1.0) -> VectorSource:
        return VectorSource(vectors[pair[1]], pair[1], pair[0] * scale, unit="relative")

    def reward(pair: tuple[float, Site], some: ItemSet, texts: int) -> float:
        return float(some.answer(source(pair), repeats=texts).reward.mean())

    left = sorted(tried, key=lambda pair: -reward(pair, _first(items), 1))[:LEFT]
    texts = 2 if items.setting.temperature else 1
    rewards = {pair: reward(pair, items, texts) for pair in tried if pair in left}
    best = max(rewards, key=lambda pair: rewards[pair])
    chosen = {"site": str(best[1]), "dose": best[0], "reward": rewards[best], "tried": len(tried)}
    return Way(lambda some, scale: some.answer(source(best, scale), kl=True), chosen)


def best_feature(items: ItemSet, candidates: Mapping[str, Sequence[int]]) -> Way:
    """A feature of the setting's SAE at its best dose."""
    choice = best_static(items, candidates, first_items=len(_first(items)), finalists=LEFT)

    def answer(some: ItemSet, scale: float) -> Answers:
        return some.answer(some.setting.static_source(choice.feature, choice.dose * scale), kl=True)

    return Way(answer, asdict(choice))


def best_prompting(items: ItemSet, model: LanguageModel | None = None) -> Way:
    """The better instruction before every prompt, of the original model or another one."""
    choice = best_instruction(items, model=model)
    return Way(
        lambda some, scale: some.answer(prompts=instructed(some, choice.instruction), model=model), asdict(choice)
    )


def _first(items: ItemSet) -> ItemSet:
    return items.take(range(0, len(items), FIRST_SHARE))
