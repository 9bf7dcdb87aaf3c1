"""Baselines that ignore the question, for tasks with options.

`always` names the same place every time, the best on validation. `prior removed` takes from each option's
log-probability the mean of its place over validation items (after Zhao et al. 2021, arXiv 2102.09690), which undoes a
liking for a letter without looking at any answer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from trimtab.control.answers import Answers, ItemSet
from trimtab.control.arm import Arm, ArmKind, Choosing, Match, register
from trimtab.errors import UserError
from trimtab.tasks import Outcome


@dataclass(frozen=True, kw_only=True)
class LetterBias:
    """What validation says about the places of options."""

    place: int
    """The place (0 for the first) that is right most often."""
    reward: float
    """Of always naming it, on validation."""
    prior: dict[int, tuple[float, ...]]
    """By number of options, the mean log-probability of each place."""


def letter_bias(validation: ItemSet) -> LetterBias:
    """Measure the places' rewards and prior on validation items.

    Raises:
        UserError: the task has no options.
    """
    most = max(len(_options(validation, i)) for i in range(len(validation)))
    if not most:
        raise UserError(
            f"letter bias of {validation.prompts.task.name}", "its answers are not options", "leave out letters"
        )
    rewards = [float(np.mean([o.reward for o in always(validation, place)])) for place in range(most)]
    by_count: defaultdict[int, list[NDArray[np.float64]]] = defaultdict(list)
    for values in _option_logp(validation):
        by_count[len(values)].append(values)
    place = int(np.argmax(rewards))
    prior = {count: tuple(np.mean(rows, axis=0).tolist()) for count, rows in by_count.items()}
    return LetterBias(place=place, reward=rewards[place], prior=prior)


def always(items: ItemSet, place: int) -> list[Outcome]:
    """Outcomes of naming the option at one place every time (the last one where an item has fewer)."""
    options = [_options(items, i) for i in range(len(items))]
    texts = [o[min(place, len(o) - 1)] if o else "" for o in options]
    return items.prompts.task.score(items.prompts.items, texts, items.prompts.permutation)


def without_prior(items: ItemSet, bias: LetterBias) -> Answers:
    """Outcomes of the unsteered model's best option, its liking for places removed."""
    texts = []
    for i, values in enumerate(_option_logp(items)):
        prior = np.array(bias.prior.get(len(values), (0.0,) * len(values)))
        texts.append(_options(items, i)[int(np.argmax(values - prior))])
    return Answers(items.prompts.task.score(items.prompts.items, texts, items.prompts.permutation))


def _options(items: ItemSet, index: int) -> tuple[str, ...]:
    return items.prompts.task.option_strings(items.prompts.items[index])


def _option_logp(items: ItemSet) -> list[NDArray[np.float64]]:
    """Log-probability of each item's options at the first token."""
    task, tokenizer = items.prompts.task, items.setting.model.tokenizer
    allowed = items.prompts.allowed or tuple(tuple(task.option_tokens(i, tokenizer)) for i in items.prompts.items)
    answers = items.answer(prompts=replace(items.prompts, allowed=allowed, max_new_tokens=1), temperature=0.0)
    assert answers.decoded is not None
    return [np.array(steps[0]) for steps in answers.decoded.allowed_logp]


@register
class Letters(ArmKind):
    """Both baselines."""

    name: ClassVar[str] = "letters"
    strengths: ClassVar[tuple[Match, ...]] = ("own",)

    def effort(self, choosing: Choosing) -> dict[str, int]:
        return {"the prior of letters": len(choosing.validation)}

    def arms(self, choosing: Choosing) -> list[Arm]:
        bias = letter_bias(choosing.validation)
        about = asdict(bias)
        return [
            self.arm(
                lambda items, scale: [Answers(always(items, bias.place))], about, name="letters: always the same"
            ),
            self.arm(
                lambda items, scale: [without_prior(items, bias)], {"prior": about["prior"]},
                name="letters: prior removed",
            ),
        ]  # fmt: skip
