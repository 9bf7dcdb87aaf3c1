"""Rollouts: decode items under a source, score them, and say what each decision was worth."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.control.task_prompts import TaskPrompts
from trimtab.lm import Decoded, InterventionSource, LanguageModel, PromptCache
from trimtab.steering import DivergenceRecorder
from trimtab.tasks import Outcome


class Rollouts(NamedTuple):
    """Decoded rows of some items, each `repeats` times, copies side by side."""

    decoded: Decoded
    outcomes: list[Outcome]
    reward: Float[Tensor, "N T"]
    """Of each decision: the outcome's at the last, less the penalty on the divergence from the unsteered model."""
    kl: Float[Tensor, "N T"] | None
    """KL(steered ‖ unsteered) at each token, in nats; None without a penalty on it."""
    seconds: float

    @property
    def mean_reward(self) -> float:
        """Of the outcomes, penalties not counted."""
        return float(np.mean([outcome.reward for outcome in self.outcomes]))

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding, prompts' own tokens not counted."""
        return sum(map(len, self.decoded.token_ids)) / self.seconds


def roll_out(
    model: LanguageModel,
    source: InterventionSource | None,
    prompts: TaskPrompts,
    *,
    kl_penalty: float = 0.0,
    prompt_cache: PromptCache | None = None,
    **options: Any,
) -> Rollouts:
    """Decode every item under a source and score it.

    Args:
        model: the model.
        source: what steers; None for the model as it is.
        prompts: what is decoded.
        kl_penalty: nats of divergence from the unsteered model are worth this much reward, at the token they occur.
        prompt_cache: keeps prompts' keys and values from rollout to rollout.
        options: further arguments of `TaskPrompts.decode`, such as `repeats`, `seed` and `first_sample`.

    Raises:
        UserError: see `decode` and `TaskPrompts.outcomes`.
    """
    recorder = DivergenceRecorder(model, source) if source is not None and kl_penalty else None
    began = time.perf_counter()
    decoded = prompts.decode(model, source, prompt_cache=prompt_cache, observe=recorder, **options)
    seconds = time.perf_counter() - began
    outcomes = prompts.outcomes(decoded)
    length = torch.tensor([len(ids) for ids in decoded.token_ids])
    reward = torch.zeros(len(decoded), prompts.max_new_tokens)
    reward[torch.arange(len(decoded)), length - 1] = torch.tensor([o.reward for o in outcomes], dtype=reward.dtype)
    kl = None
    if recorder is not None:
        kl = recorder.measure(decoded, prompt_cache)
        reward[:, : kl.shape[1]] -= kl_penalty * kl
    return Rollouts(decoded, outcomes, reward.to(model.device), kl, seconds)
