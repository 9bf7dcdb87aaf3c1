"""How learned controls are trained: on the policy's training prompts, from right answers or from rewards alone.

Where a task's answer is one token and the task says which option is right, the loss is the cross-entropy of that token
(among the options, if decoding is restricted to them). Elsewhere it is REINFORCE: answers are sampled at temperature 1
under the control, and each one's reward less the mean of the item's other answers weights its log-probability (Kool et
al. 2019). The state with the best greedy reward on validation is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.lm import PromptCache
from trimtab.policies.controls.answers import LOGIT_BUDGET, answer_logits
from trimtab.policies.controls.scene import Played, Scene

CROSS_ENTROPY = "cross-entropy of the right answer"
REINFORCE = "REINFORCE on the reward"


class Learnable(Protocol):
    """A control with parameters."""

    @property
    def module(self) -> nn.Module:
        """Holds the parameters."""
        ...

    def applied(self, scene: Scene) -> AbstractContextManager[Any]:
        """The model under the control, differentiably, at the places that `answer_logits` feeds."""
        ...

    def cache(self, scene: Scene) -> PromptCache | None:
        """What `answer_logits` is to use."""
        ...

    def play(
        self, scene: Scene, *, repeats: int = 1, seed: int | None = None, temperature: float | None = None
    ) -> Played:
        """Decode under the control."""
        ...


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Lesson(NamedTuple):
    prompts: list[list[int]]
    answers: list[list[int]]
    weight: Tensor
    allowed: Sequence[Sequence[int]] | None


def right_answers(scene: Scene) -> list[int] | None:
    """The right token of every item, or None where the task has no such thing."""
    episodes, task = scene.episodes, scene.episodes.task
    if episodes.max_new_tokens != 1:
        return None
    try:
        if episodes.allowed is not None:
            tokens = episodes.allowed
        else:
            tokens = [task.option_tokens(item, scene.setup.model.tokenizer) for item in episodes.items]
        right = (task.correct_option(item, episodes.permutation) for item in episodes.items)
        return [options[place] for place, options in zip(right, tokens, strict=True)]
    except UserError:
        return None


def learn(
    control: Learnable,
    train: Scene,
    validation: Scene,
    *,
    steps: int,
    learning_rate: float,
    batch: int = 16,
    samples: int = 4,
    validate_every: int = 25,
    seed: int = 0,
) -> Learned:
    """Train a control in place; it ends in its best state.

    Args:
        control: what is trained.
        train: items to learn from.
        validation: items to choose the state by.
        steps: of Adam.
        learning_rate: of Adam.
        batch: items of a step.
        samples: answers per item, for REINFORCE.
        validate_every: steps between evaluations on validation.
        seed: of items and answers.
    """
    gold = right_answers(train)
    parameters = [p for p in control.module.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    best: tuple[float, int, dict[str, Tensor]] = (-np.inf, 0, {})
    for step in range(steps + 1):
        if step % validate_every == 0 or step == steps:
            reward = float(control.play(validation).reward.mean())
            if reward > best[0]:
                best = (reward, step, copy.deepcopy(control.module.state_dict()))
        if step == steps:
            break
        which = np.random.default_rng([seed, 21, step]).choice(len(train), min(batch, len(train)), replace=False)
        part = train.take(which.tolist())
        if gold is None:
            lesson = _from_rewards(control, part, samples, seed * 100_003 + step)
        else:
            lesson = _from_answers(part, [gold[i] for i in which])
        optimiser.zero_grad()
        if _backward(control, part, lesson):
            optimiser.step()
    control.module.load_state_dict(best[2])
    return Learned(
        objective=REINFORCE if gold is None else CROSS_ENTROPY,
        steps=steps,
        best_step=best[1],
        reward=best[0],
        items=len(train),
    )


def _from_answers(scene: Scene, gold: list[int]) -> _Lesson:
    episodes = scene.episodes
    allowed = None if episodes.allowed is None else list(episodes.allowed)
    return _Lesson([list(p) for p in episodes.prompts], [[token] for token in gold], torch.ones(len(gold)), allowed)


def _from_rewards(control: Learnable, scene: Scene, samples: int, seed: int) -> _Lesson:
    played = control.play(scene, repeats=samples, seed=seed, temperature=1.0)
    assert played.decoded is not None
    reward = torch.tensor(played.reward, dtype=torch.float32).reshape(-1, samples)
    advantage = (reward - reward.mean(1, keepdim=True)) * samples / max(1, samples - 1)
    allowed = scene.episodes.allowed
    rows = None if allowed is None else [allowed[i] for i in range(len(scene)) for _ in range(samples)]
    return _Lesson(played.decoded.prompts, played.decoded.token_ids, advantage.flatten(), rows)


def _backward(control: Learnable, scene: Scene, lesson: _Lesson) -> bool:
    """Gradients of −Σ weight · log p(answer) / rows; False if no answer says anything."""
    model = scene.setup.model
    telling = lesson.weight.nonzero()[:, 0].tolist()
    longest = max(map(len, lesson.answers))
    per_pass = max(1, min(64, LOGIT_BUDGET // (longest * model.vocab_size)))
    for start in range(0, len(telling), per_pass):
        rows = telling[start : start + per_pass]
        answers = [lesson.answers[r] for r in rows]
        with torch.enable_grad():
            prompts = [lesson.prompts[r] for r in rows]
            logits = answer_logits(model, prompts, answers, control.cache(scene), [control.applied(scene)]).float()
            if lesson.allowed is not None:
                logits = _only(logits, [lesson.allowed[r] for r in rows])
            logp = logits.log_softmax(-1)
            total = torch.stack(
                [
                    logp[i, : len(answer)].gather(1, torch.tensor(answer, device=logp.device)[:, None]).sum()
                    for i, answer in enumerate(answers)
                ]
            )
            loss = -(lesson.weight[rows].to(total.device) * total).sum() / len(lesson.weight)
            loss.backward()
    return bool(telling)


def _only(logits: Tensor, allowed: list[Sequence[int]]) -> Tensor:
    keep = torch.zeros(len(allowed), logits.shape[-1], dtype=torch.bool)
    for i, tokens in enumerate(allowed):
        keep[i, list(tokens)] = True
    return logits.masked_fill(~keep.to(logits.device)[:, None], -torch.inf)
