"""Rollouts: decode items under a source, score them, and say what each decision was worth."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

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
    """KL(steered ‖ unsteered) at each token, in nats, if it was asked for."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding, prompts' own tokens not counted."""
        return sum(map(len, self.decoded.token_ids)) / self.seconds


def roll_out(
    model: LanguageModel,
    source: InterventionSource | None,
    prompts: TaskPrompts,
    *,
    repeats: int = 1,
    seed: int = 0,
    temperature: float = 0.0,
    batch_size: int = 64,
    first_sample: int = 0,
    kl_penalty: float = 0.0,
    measure_kl: bool = False,
    prompt_cache: PromptCache | None = None,
    progress: Callable[[int], None] | None = None,
) -> Rollouts:
    """Decode every item under a source and score it.

    Args:
        model: the model.
        source: what steers; None for the model as it is.
        prompts: what is decoded.
        repeats: rows per item.
        seed: of all draws.
        temperature: of tokens; actions are drawn by the source.
        batch_size: rows decoded together.
        first_sample: key of the first item's draws; the others follow, so that later rollouts draw anew.
        kl_penalty: nats of divergence from the unsteered model are worth this much reward, at the token they occur.
        measure_kl: compute the divergence even without a penalty.
        prompt_cache: keeps prompts' keys and values from rollout to rollout.
        progress: called with the number of rows whenever some have ended.

    Raises:
        UserError: see `decode` and `TaskPrompts.outcomes`.
    """
    recorder = DivergenceRecorder(model, source) if source is not None and (kl_penalty or measure_kl) else None
    began = time.perf_counter()
    with recorder or nullcontext():
        decoded = prompts.decode(
            model,
            source,
            repeats=repeats,
            seed=seed,
            temperature=temperature,
            batch_size=batch_size,
            first_sample=first_sample,
            prompt_cache=prompt_cache,
            progress=progress,
            observe=recorder.see if recorder else None,
        )
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
