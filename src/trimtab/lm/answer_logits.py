"""Next-token logits at the places of given answers, through prompts' cached keys and values.

Only the last prompt token and the answer are fed to the model, so that a divergence costs one token per decision, and a
gradient through an edit at these places needs no pass over the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.lm.batch import TokenBatch
from trimtab.lm.model import LanguageModel
from trimtab.lm.prompt_cache import PromptCache


def answer_logits(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    cache: PromptCache | None,
    under: AbstractContextManager[Any] | None = None,
) -> Float[Tensor, "B A V"]:
    """Logits from which each token of each answer is chosen.

    Args:
        model: the model.
        prompts: token ids, at least two each.
        answers: token ids, at least one each; A is the longest. Logits behind an answer's end mean nothing.
        cache: holds the prompts; without it they are fed too.
        under: what changes the model while this is fed, and not while the cache is filled. With a cache, sites show the
            A fed places of each row, time 0 being the last prompt token.
    """
    longest = max(map(len, answers))
    fed = [[*answer[:-1], *[model.pad_id] * (longest - len(answer))] for answer in answers]
    if cache is None:
        rows = [[*prompt, *rest] for prompt, rest in zip(prompts, fed, strict=True)]
        batch, held, past = TokenBatch.pad(rows, model.pad_id, model.device), None, None
    else:
        heads = [list(prompt[:-1]) for prompt in prompts]
        held = cache.load(heads, max(map(len, heads)) + longest)
        ids = [[prompt[-1], *rest] for prompt, rest in zip(prompts, fed, strict=True)]
        batch = TokenBatch.full(torch.tensor(ids, device=model.device))
        past = torch.tensor([len(head) for head in heads], device=model.device)
    with under or nullcontext():
        return model.forward(batch, cache=held, past_lengths=past, last=longest)
