"""Baselines for tasks with options that know nothing of the question.

`always` names the same place every time, the best on validation. `prior removed` takes from each option's
log-probability the mean of its place over validation items (after Zhao et al. 2021, arXiv 2102.09690), which undoes a
liking for a letter without looking at any answer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.policies.controls.scene import Played, Scene
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def letter_bias(validation: Scene) -> LetterBias:
    """Measure the places' rewards and prior on validation items.

    Raises:
        UserError: the task has no options.
    """
    most = max(len(_options(validation, i)) for i in range(len(validation)))
    if not most:
        raise UserError(
            f"letter bias of {validation.episodes.task.name}", "its answers are not options", "leave out letters"
        )
    rewards = [float(np.mean([o.reward for o in always(validation, place)])) for place in range(most)]
    by_count: defaultdict[int, list[NDArray[np.float64]]] = defaultdict(list)
    for values in _option_logp(validation):
        by_count[len(values)].append(values)
    place = int(np.argmax(rewards))
    prior = {count: tuple(np.mean(rows, axis=0).tolist()) for count, rows in by_count.items()}
    return LetterBias(place=place, reward=rewards[place], prior=prior)


def always(scene: Scene, place: int) -> list[Outcome]:
    """Outcomes of naming the option at one place every time (the last one where an item has fewer)."""
    options = [_options(scene, i) for i in range(len(scene))]
    texts = [o[min(place, len(o) - 1)] if o else "" for o in options]
    return scene.episodes.task.score(scene.episodes.items, texts, scene.episodes.permutation)


def without_prior(scene: Scene, bias: LetterBias) -> Played:
    """Outcomes of the unsteered model's best option, its liking for places removed."""
    texts = []
    for i, values in enumerate(_option_logp(scene)):
        prior = np.array(bias.prior.get(len(values), (0.0,) * len(values)))
        texts.append(_options(scene, i)[int(np.argmax(values - prior))])
    return Played(scene.episodes.task.score(scene.episodes.items, texts, scene.episodes.permutation))


def _options(scene: Scene, index: int) -> tuple[str, ...]:
    return scene.episodes.task.option_strings(scene.episodes.items[index])


def _option_logp(scene: Scene) -> list[NDArray[np.float64]]:
    """Log-probability of each item's options at the first token."""
    task, tokenizer = scene.episodes.task, scene.setup.model.tokenizer
    allowed = scene.episodes.allowed or tuple(tuple(task.option_tokens(i, tokenizer)) for i in scene.episodes.items)
    played = scene.play(episodes=replace(scene.episodes, allowed=allowed, max_new_tokens=1), temperature=0.0)
    assert played.decoded is not None
    return [np.array(steps[0]) for steps in played.decoded.allowed_logp]
