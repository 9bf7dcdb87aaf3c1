"""Exact effects of edits on examples: by their answers' log-probabilities, or by decoding where answers are long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.finding.examples import Examples
from trimtab.finding.passes import EditedPasses, answer_log_probs, check_finite
from trimtab.finding.steering_edit import SteeringEdit, Tables, source_of, together
from trimtab.lm import LanguageModel, PromptCache, Site

Progress = Callable[[int], None] | None


class Scorer(Protocol):
    """Scores of some examples under edits."""

    examples: Examples
    base: Tensor  # [X] unsteered

    def effects(self, tables: Tables, edits: Sequence[SteeringEdit], progress: Progress = None) -> Tensor:
        """`[E, X]`, every example's score under each edit less its score unsteered.

        Args:
            tables: of the edits' directions.
            edits: what to do.
            progress: called with the number of answers that are done.

        Raises:
            UserError: a score is not finite.
        """
        ...


def scorer(model: LanguageModel, examples: Examples, sites: Sequence[Site], cache: PromptCache | None = None) -> Scorer:
    """What scores examples exactly.

    Args:
        model: the model.
        examples: what is scored.
        sites: all that edits may be at.
        cache: of prompts.
    """
    kind = LikelihoodScorer if examples.decoding is None else DecodingScorer
    return kind(model, examples, sites, cache or PromptCache(model))


class LikelihoodScorer:
    """By the log-probabilities of the examples' answers."""

    def __init__(self, model: LanguageModel, examples: Examples, sites: Sequence[Site], cache: PromptCache) -> None:
        answered = examples.answered
        self.examples, self.answers = examples, [one.answer for one in answered]
        self.log_probs = torch.empty(len(answered), dtype=torch.float64)

        def see(number: int, logits: Float[Tensor, "A V"]) -> None:
            self.log_probs[number] = answer_log_probs(logits[None], [self.answers[number]]).sum().double()

        self.passes = EditedPasses(model, answered, sites, cache, see)
        self.base = examples.scores(self.log_probs)
        check_finite(self.base, "unsteered scores")

    def effects(self, tables: Tables, edits: Sequence[SteeringEdit], progress: Progress = None) -> Float[Tensor, "E X"]:
        def log_prob(number: int, logits: Float[Tensor, "E A V"]) -> Float[Tensor, " E"]:
            return answer_log_probs(logits, [self.answers[number]] * len(logits)).sum(-1)

        found = self.examples.scores(self.passes.reduce(tables, edits, log_prob, progress))
        check_finite(found, "scores under an edit")
        return found - self.base


class DecodingScorer:
    """By the rewards of greedy answers."""

    def __init__(self, model: LanguageModel, examples: Examples, sites: Sequence[Site], cache: PromptCache) -> None:
        del sites
        assert examples.decoding is not None
        self.model, self.examples, self.prompts, self.cache = model, examples, examples.decoding, cache
        outcomes = self.prompts.outcomes(self.prompts.decode(model, prompt_cache=cache))
        self.base = torch.tensor([one.reward for one in outcomes], dtype=torch.float64)

    def effects(self, tables: Tables, edits: Sequence[SteeringEdit], progress: Progress = None) -> Float[Tensor, "E X"]:
        found = torch.empty(len(edits), len(self.prompts), dtype=torch.float64)
        for members in together(edits):
            mine = [edits[i] for i in members]
            source = source_of(tables, mine * len(self.prompts))
            decoded = self.prompts.decode(
                self.model, source, repeats=len(mine), prompt_cache=self.cache, progress=progress
            )
            rewards = [one.reward for one in self.prompts.outcomes(decoded)]
            found[members] = torch.tensor(rewards, dtype=torch.float64).reshape(-1, len(mine)).T
        return found - self.base
