"""Next-token logits at the places of given answers, through prompts' cached keys and values.

Only the last prompt token and the answer are fed to the model, so that a divergence costs one token per decision, and a
gradient through an edit at these places needs no pass over the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.control.adapter import Adapter
from trimtab.lm import (
    Decoded,
    EditLog,
    InterventionSource,
    LanguageModel,
    PromptCache,
    RowDelta,
    Site,
    TokenBatch,
    edited,
)

LOGIT_BUDGET = 1 << 25
"""Logits held at once; rows per pass follow from it."""


def answer_logits(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    cache: PromptCache | None,
    under: Sequence[AbstractContextManager[Any]] = (),
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
        with _all(under):
            return model.forward(TokenBatch.pad(rows, model.pad_id, model.device), last=longest)
    heads = [list(prompt[:-1]) for prompt in prompts]
    held = cache.load(heads, max(map(len, heads)) + longest)
    ids = torch.tensor([[prompt[-1], *rest] for prompt, rest in zip(prompts, fed, strict=True)], device=model.device)
    past = torch.tensor([len(head) for head in heads], device=model.device)
    with _all(under):
        return model.forward(TokenBatch.full(ids), cache=held, past_lengths=past, last=longest)


@contextmanager
def _all(contexts: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@torch.no_grad()
def divergence(
    model: LanguageModel,
    decoded: Decoded,
    cache: PromptCache,
    source: InterventionSource | None = None,
    adapter: Adapter | None = None,
) -> Float[Tensor, " N"]:
    """KL(steered ‖ unsteered) of each decoded answer, in nats, summed over its tokens.

    Args:
        model: the model that decoded.
        decoded: answers and edits, all behind the last prompt token.
        cache: holds the prompts of the unchanged model.
        source: decided the edits; it is not asked again.
        adapter: changed the model.
    """
    longest = max(map(len, decoded.token_ids))
    per_pass = max(1, min(64, LOGIT_BUDGET // (longest * model.vocab_size)))
    found = torch.zeros(len(decoded))
    for start in range(0, len(decoded), per_pass):
        rows = range(start, min(start + per_pass, len(decoded)))
        prompts, answers = [decoded.prompts[r] for r in rows], [decoded.token_ids[r] for r in rows]
        under: list[AbstractContextManager[Any]] = []
        if source is not None:
            under.append(edited(model, _logged(model, source, decoded.edits, rows, prompts)))
        if adapter is not None:
            under.append(adapter.active())
        held = cache if adapter is None else adapter.cache(cache)
        steered = answer_logits(model, prompts, answers, held, under).float().log_softmax(-1)
        plain = answer_logits(model, prompts, answers, cache).float().log_softmax(-1)
        kl = (steered.exp() * (steered - plain)).sum(-1).clamp_min(0).cpu()
        for i, row in enumerate(rows):
            found[row] = kl[i, : len(answers[i])].sum()
    return found


def _logged(
    model: LanguageModel, source: InterventionSource, log: EditLog, rows: range, prompts: Sequence[Sequence[int]]
) -> dict[Site, Callable[[Tensor], RowDelta | None]]:
    """The logged edits of consecutive rows, as changes of the places that `answer_logits` feeds."""
    first = torch.tensor([len(prompt) - 1 for prompt in prompts])
    edits: dict[Site, Callable[[Tensor], RowDelta | None]] = {}
    for index, site in enumerate(source.sites):
        mine = log.take((log.site == index) & (log.row >= rows.start) & (log.row < rows.stop))
        place = mine.row - rows.start
        time = mine.position - first[place]
        edit = mine.to(model.device).edit()
        change = edit.change(source.directions(site), place.to(model.device), time.to(model.device))
        change = change if len(mine) else None
        edits[site] = lambda x, change=change: change
    return edits
