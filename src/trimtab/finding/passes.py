"""Prompts and answers through the model: unsteered in batches, and under many edits from the first edited layer up.

Only the last prompt token and the answer are fed, behind the prompt's cached keys and values; these are the places that
a decode edits. What the layers below the first edited one give is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.finding.examples import Answered
from trimtab.finding.steering_edit import SteeringEdit, Tables, source_of, steering, together
from trimtab.lm import LanguageModel, PromptCache, Site, TokenBatch, edited
from trimtab.lm.answer_logits import answer_logits
from trimtab.lm.token_statistics import log_normalisers
from trimtab.lm.upper_layers import first_edited_layer, input_site, starting_at

LOGITS = 1 << 25
"""Held at once; rows per pass follow from it."""
ROWS = 256
"""Rows of a pass at most: of few tokens, more of them are no faster."""


def check_lengths(model: LanguageModel, answered: Sequence[Answered]) -> None:
    """Raise a `UserError` if an answer is empty, or with its prompt longer than the model's context."""
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    for number, (prompt, answer) in enumerate(answered):
        if not answer:
            raise UserError(f"answer {number}", "it gives no token", "give some text")
        if limit and len(prompt) + len(answer) > limit:
            why = f"with its prompt it has {len(prompt) + len(answer)} tokens, and {model.name} holds {limit}"
            raise UserError(f"answer {number}", why, "shorten it")


def fed_ids(model: LanguageModel, answered: Sequence[Answered]) -> Int[Tensor, "R A"]:
    """What `run` feeds: the last prompt token, the answer but its last token, and padding."""
    longest = max(len(one.answer) for one in answered)
    rows = [[one.prompt[-1], *one.answer[:-1]] for one in answered]
    return torch.tensor([row + [model.pad_id] * (longest - len(row)) for row in rows], device=model.device)


def run(
    model: LanguageModel,
    answered: Sequence[Answered],
    cache: PromptCache,
    under: AbstractContextManager[Any] | None = None,
) -> Float[Tensor, "R A V"]:
    """Logits from which each token of some answers is chosen; sites show these places alone.

    The prompts are all of one token, or all of more.
    """
    prompts, answers = [one.prompt for one in answered], [one.answer for one in answered]
    return answer_logits(model, prompts, answers, cache if len(prompts[0]) > 1 else None, under)


def batches(model: LanguageModel, answered: Sequence[Answered], weight: int = 1) -> Iterator[list[int]]:
    """Which answers go through the model together, those of like length side by side.

    Args:
        model: the model.
        answered: prompts with answers.
        weight: how many times the logits of one pass are held, as for gradients.
    """
    order = sorted(range(len(answered)), key=lambda i: (len(answered[i].prompt) > 1, len(answered[i].answer)))
    part: list[int] = []
    for i in order:
        size = (len(part) + 1) * len(answered[i].answer) * model.vocab_size * weight
        alike = not part or (len(answered[part[0]].prompt) > 1) == (len(answered[i].prompt) > 1)
        if part and (size > LOGITS or not alike or len(part) >= ROWS):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def answer_log_probs(logits: Float[Tensor, "R A V"], answers: Sequence[Sequence[int]]) -> Float[Tensor, "R A"]:
    """Log-probability of each token of answers in order, in float32 or better; 0 behind an answer's end."""
    longest = logits.shape[1]
    targets = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers], device=logits.device)
    real = torch.tensor([[t < len(answer) for t in range(longest)] for answer in answers], device=logits.device)
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    return torch.where(real, chosen - log_normalisers(logits), 0)


class EditedPasses:
    """Answers under many edits each.

    Args:
        model: the model.
        answered: prompts with answers.
        sites: all that edits may be at.
        cache: of prompts.
        see: shown the unsteered logits `[A, V]` of each answer, by its number.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        answered: Sequence[Answered],
        sites: Sequence[Site],
        cache: PromptCache | None = None,
        see: Callable[[int, Float[Tensor, "A V"]], None] | None = None,
    ) -> None:
        check_lengths(model, answered)
        self.model, self.answered, self.cache = model, list(answered), cache or PromptCache(model)
        self._below: dict[int, dict[Site, Float[Tensor, "1 A d"]]] = {}
        inputs = list(dict.fromkeys(input_site(first_edited_layer([site])) for site in sites))
        for part in batches(model, self.answered):
            seen: dict[Site, Tensor] = {}
            reading = {site: partial(seen.__setitem__, site) for site in inputs}
            logits = run(model, [self.answered[i] for i in part], self.cache, edited(model, reading))
            for row, i in enumerate(part):
                n = len(self.answered[i].answer)
                self._below[i] = {site: seen[site][row : row + 1, :n].clone() for site in inputs}
                if see is not None:
                    see(i, logits[row, :n])

    @torch.no_grad()
    def reduce(
        self,
        tables: Tables,
        edits: Sequence[SteeringEdit],
        to: Callable[[int, Float[Tensor, "E A V"]], Float[Tensor, " E"]],
        progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "E S"]:
        """A number of every answer under every edit.

        Args:
            tables: of the edits' directions.
            edits: what to do.
            to: from an answer's number and its logits under some edits to one number for each.
            progress: called with the number of edited answers that are done.
        """
        found = torch.empty(len(edits), len(self.answered), dtype=torch.float64)
        for members in together(edits):
            mine = [edits[i] for i in members]
            layer = first_edited_layer(mine[0].sites)
            for number, one in enumerate(self.answered):
                size = max(1, min(ROWS, LOGITS // (len(one.answer) * self.model.vocab_size)))
                for start in range(0, len(mine), size):
                    part = mine[start : start + size]
                    values = to(number, self._logits(tables, part, number, layer)).double().cpu()
                    found[members[start : start + size], number] = values
                    if progress is not None:
                        progress(len(part))
        return found

    def _logits(self, tables: Tables, edits: Sequence[SteeringEdit], number: int, layer: int) -> Float[Tensor, "E A V"]:
        model, one, rows = self.model, self.answered[number], len(edits)
        fed = fed_ids(model, [one]).expand(rows, -1)
        below = self._below[number][input_site(layer)].expand(rows, -1, -1)
        cache = self.cache.load([one.prompt[:-1]], len(one.prompt)).frozen() if len(one.prompt) > 1 else None
        with ExitStack() as stack:
            stack.enter_context(starting_at(model, layer, below))
            stack.enter_context(steering(model, source_of(tables, edits), [one.prompt] * rows, fed))
            return model.forward(TokenBatch.full(fed), cache=cache, last=fed.shape[1])


def check_finite(scores: Tensor, what: str) -> None:
    """Raise a `UserError` if a score is not a number."""
    if not bool(torch.isfinite(scores).all()):
        n = int((~torch.isfinite(scores)).sum())
        raise UserError(what, f"{n} of {scores.numel()} are not finite", "use --dtype float32, or smaller doses")
