"""A task's reward: exactly over the options where an answer is one token, else by decoding.

Where answers are longer, some are drawn from the unsteered model. Each one's reward less the mean of the item's others
weighs its log-probability, which gives the gradient of the expected reward (Kool et al. 2019); what an edit does is
then measured by decoding under it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.control.task_prompts import TaskPrompts
from trimtab.errors import UserError
from trimtab.finding.examples import Answered, Ask, Example, Examples, ExpectedReward, WeightedSum
from trimtab.finding.wishes.wish import Wish
from trimtab.lm import LanguageModel
from trimtab.tasks import Task

SAMPLES = 4
"""Answers that are drawn for an item."""


@dataclass(frozen=True, kw_only=True)
class TaskReward(Wish):
    """A task's items of one split, by their reward."""

    task: Task
    split: str = "train"
    """Whose items; all three splits of the wish are made of them."""
    items: int = 96
    """As many items at most."""
    seed: int = 0
    """Of drawn answers."""

    def __post_init__(self) -> None:
        if not hasattr(self.task, "splits"):
            raise UserError(f"task {self.task!r}", "it is none", 'give the task, such as load_task("ioi-mixture")')

    @property
    def about(self) -> str:
        return self.task.name

    def examples(self, model: LanguageModel) -> Examples:
        task, items = self.task, self.task.sample(self.split, self.items)
        prompts = TaskPrompts.of(model, task, items, options_only=task.options_only)
        chat = task.chat and bool(model.tokenizer.chat_template)
        asks = [Ask(task.prompt(item), chat) for item in items]
        one_token = prompts.allowed is not None and prompts.max_new_tokens == 1
        make = self._exactly if one_token else self._drawn
        found = make(model, prompts, asks)
        return Examples(
            kind="task",
            unit=f"reward of {task.name}",
            examples=tuple(found),
            instructions=(*self.instruction, *task.instructions),
            decoding=None if one_token else prompts,
            reader=prompts,
            notes=() if one_token else (f"gradients by {SAMPLES} answers drawn for each item, effects by decoding",),
        )

    def _exactly(self, model: LanguageModel, prompts: TaskPrompts, asks: list[Ask]) -> list[Example]:
        assert prompts.allowed is not None
        found = []
        for item, ids, allowed, ask in zip(prompts.items, prompts.ids, prompts.allowed, asks, strict=True):
            texts = [model.decode_continuation([token]) for token in allowed]
            rewards = tuple(o.reward for o in self.task.score([item] * len(allowed), texts))
            answered = tuple(Answered(ids, (token,)) for token in allowed)
            found.append(
                Example(id=item.id, answered=answered, score=ExpectedReward(rewards), asks=(ask,) * len(allowed))
            )
        if not any(len(set(example.score.rewards)) > 1 for example in found):  # type: ignore[attr-defined]
            raise UserError(f"task {self.task.name}", "all options have the same reward", "choose another task")
        return found

    def _drawn(self, model: LanguageModel, prompts: TaskPrompts, asks: list[Ask]) -> list[Example]:
        decoded = prompts.decode(model, seed=self.seed, temperature=1.0, repeats=SAMPLES)
        rewards = np.array([outcome.reward for outcome in prompts.outcomes(decoded)]).reshape(-1, SAMPLES)
        logp = np.array([sum(row) for row in decoded.token_logp]).reshape(-1, SAMPLES)
        weights = (rewards - rewards.mean(1, keepdims=True)) / (SAMPLES - 1)
        if not weights.any():
            why = f"the {SAMPLES} answers drawn for each item are all worth the same"
            raise UserError(f"task {self.task.name}", why, "choose another task, or more items")
        offset = rewards.mean(1) - (weights * logp).sum(1)
        tokens = [tuple(ids) for ids in decoded.token_ids]
        return [
            Example(
                id=item.id,
                answered=tuple(Answered(prompts.ids[i], tokens[i * SAMPLES + s]) for s in range(SAMPLES)),
                score=WeightedSum(tuple(weights[i].tolist()), float(offset[i])),
                asks=(asks[i],) * SAMPLES,
            )
            for i, item in enumerate(prompts.items)
        ]
