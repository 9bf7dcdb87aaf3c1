"""How arms with parameters are trained: on training prompts, from right answers or from rewards alone.

Where a task's answer is one token and the task says which option is right, the loss is the cross-entropy of that token
(among the options, if decoding is restricted to them). Elsewhere it is REINFORCE: answers are sampled at temperature 1
under the arm, and each one's reward less the mean of the item's other answers weights its log-probability (Kool et
al. 2019). The state with the best greedy reward on validation is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.control.answers import ItemSet
from trimtab.errors import UserError
from trimtab.lm import PromptCache
from trimtab.lm.answer_logits import answer_logits

SAMPLES, VALIDATE_EVERY = 4, 25
"""Answers per item, for REINFORCE, and steps between evaluations on validation."""
CROSS_ENTROPY = "cross-entropy of the right answer"
REINFORCE = "REINFORCE on the reward"

LOGIT_BUDGET = 1 << 25
"""Logits held at once; rows per pass follow from it."""


class Learnable(nn.Module):
    """Something with parameters that changes a model's answers."""

    def applied(self, items: ItemSet) -> AbstractContextManager[Any]:
        """The model under the arm, differentiably, at the places that `answer_logits` feeds."""
        raise NotImplementedError

    def cache(self, items: ItemSet) -> PromptCache | None:
        """What `answer_logits` is to use."""
        return items.cache

    def changes(self, items: ItemSet) -> dict[str, Any]:
        """What `ItemSet.answer` takes to decode under the arm."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a training came to."""

    objective: str
    steps: int
    best_step: int
    reward: float
    """Mean on validation, greedy."""
    items: int
    """Training items."""


class _WeightedAnswers(NamedTuple):
    prompts: list[list[int]]
    answers: list[list[int]]
    weight: Tensor
    allowed: Sequence[Sequence[int]] | None


def right_answers(items: ItemSet) -> list[int] | None:
    """The right token of every item, or None where the task has no such thing."""
    prompts, task = items.prompts, items.prompts.task
    if prompts.max_new_tokens != 1:
        return None
    try:
        if prompts.allowed is not None:
            tokens = prompts.allowed
        else:
            tokens = [task.option_tokens(item, items.setting.model.tokenizer) for item in prompts.items]
        right = (task.correct_option(item, prompts.permutation) for item in prompts.items)
        return [options[place] for place, options in zip(right, tokens, strict=True)]
    except UserError:
        return None


def answers_to_learn(train: ItemSet, validation: ItemSet, *, steps: int, batch: int) -> int:
    """Answers that `learn` asks for; items of a step count as one each where right answers are known."""
    each = min(batch, len(train)) * (SAMPLES if right_answers(train) is None else 1)
    return steps * each + len(validation) * (-(-steps // VALIDATE_EVERY) + 1)


def learn(
    arm: Learnable,
    train: ItemSet,
    validation: ItemSet,
    *,
    steps: int,
    lr: float,
    batch: int = 16,
    seed: int = 0,
) -> Learned:
    """Train an arm in place; it ends in its best state.

    Args:
        arm: what is trained.
        train: items to learn from.
        validation: items to choose the state by.
        steps: of Adam.
        lr: of Adam.
        batch: items of a step.
        seed: of items and answers.
    """
    gold = right_answers(train)
    optimiser = torch.optim.Adam(arm.parameters(), lr=lr)
    best: tuple[float, int, dict[str, Tensor]] = (-np.inf, 0, {})
    for step in range(steps + 1):
        if step % VALIDATE_EVERY == 0 or step == steps:
            reward = float(validation.answer(**arm.changes(validation)).reward.mean())
            if reward > best[0]:
                best = (reward, step, copy.deepcopy(arm.state_dict()))
        if step == steps:
            break
        which = np.random.default_rng([seed, 21, step]).choice(len(train), min(batch, len(train)), replace=False)
        part = train.take(which.tolist())
        if gold is None:
            weighted = _from_rewards(arm, part, seed * 100_003 + step)
        else:
            weighted = _from_answers(part, [gold[i] for i in which])
            train.setting.meter.advance(len(part))
        optimiser.zero_grad()
        if _backward(arm, part, weighted):
            optimiser.step()
    arm.load_state_dict(best[2])
    objective = REINFORCE if gold is None else CROSS_ENTROPY
    return Learned(objective=objective, steps=steps, best_step=best[1], reward=best[0], items=len(train))


def _from_answers(items: ItemSet, gold: list[int]) -> _WeightedAnswers:
    prompts = items.prompts
    allowed = None if prompts.allowed is None else list(prompts.allowed)
    return _WeightedAnswers([list(p) for p in prompts.ids], [[token] for token in gold], torch.ones(len(gold)), allowed)


def _from_rewards(arm: Learnable, items: ItemSet, seed: int) -> _WeightedAnswers:
    answers = items.answer(**arm.changes(items), repeats=SAMPLES, seed=seed, temperature=1.0)
    assert answers.decoded is not None
    reward = torch.tensor(answers.reward, dtype=torch.float32).reshape(-1, SAMPLES)
    advantage = (reward - reward.mean(1, keepdim=True)) * SAMPLES / (SAMPLES - 1)
    allowed = items.prompts.allowed
    rows = None if allowed is None else [tokens for tokens in allowed for _ in range(SAMPLES)]
    return _WeightedAnswers(answers.decoded.prompts, answers.decoded.token_ids, advantage.flatten(), rows)


def _backward(arm: Learnable, items: ItemSet, weighted: _WeightedAnswers) -> bool:
    """Gradients of −Σ weight · log p(answer) / rows; False if no answer says anything."""
    model = items.setting.model
    telling = weighted.weight.nonzero()[:, 0].tolist()
    longest = max(map(len, weighted.answers))
    per_pass = max(1, min(64, LOGIT_BUDGET // (longest * model.vocab_size)))
    for start in range(0, len(telling), per_pass):
        rows = telling[start : start + per_pass]
        answers = [weighted.answers[r] for r in rows]
        with torch.enable_grad():
            prompts = [weighted.prompts[r] for r in rows]
            logits = answer_logits(model, prompts, answers, arm.cache(items), arm.applied(items)).float()
            if weighted.allowed is not None:
                logits = _only(logits, [weighted.allowed[r] for r in rows])
            logp = logits.log_softmax(-1)
            total = torch.stack(
                [
                    logp[i, : len(answer)].gather(1, torch.tensor(answer, device=logp.device)[:, None]).sum()
                    for i, answer in enumerate(answers)
                ]
            )
            loss = -(weighted.weight[rows].to(total.device) * total).sum() / len(weighted.weight)
            loss.backward()
    return bool(telling)


def _only(logits: Tensor, allowed: list[Sequence[int]]) -> Tensor:
    keep = torch.zeros(len(allowed), logits.shape[-1], dtype=torch.bool)
    for i, tokens in enumerate(allowed):
        keep[i, list(tokens)] = True
    return logits.masked_fill(~keep.to(logits.device)[:, None], -torch.inf)
