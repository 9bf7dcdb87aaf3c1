"""A chat model behind an OpenAI-compatible endpoint as a judge of features. Needs the extra `judge`.

A reply that is nonsense or cut short is asked for again; what gets no whole reply in the end is `Unjudged`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from trimtab.interpreting.judge import Exemplars, Meaning, Passage, Rating, ToRate
from trimtab.interpreting.judges import questions
from trimtab.judges import ChatConfig, ChatJudge, NoReply, Unjudged
from trimtab.runs import check_least


@dataclass(frozen=True, kw_only=True)
class FeatureEndpointConfig(ChatConfig):
    """Where the judge is and how it is asked."""

    passages: int = 14
    """Passages of one feature in a request."""
    max_tokens: int = 120
    """Tokens of a reply at most; a model that thinks before it answers needs more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "passages", "max_tokens")


class EndpointFeatureJudge(ChatJudge[FeatureEndpointConfig]):
    """Asks a chat model at temperature 0. Its concept score is of the steered text alone, as in AxBench."""

    @property
    def version(self) -> str:
        return "1"

    def explain(self, exemplars: Sequence[Exemplars]) -> list[Meaning | Unjudged]:
        """What features mean, in order.

        Raises:
            UserError: the client is not installed, there is no key, or the endpoint refuses the key or the model.
        """
        asked = [self._request(*questions.explain_question(one)) for one in exemplars]
        replies = self.client.ask(asked, useful=lambda reply: questions.read_meaning(reply) is not None)
        return [
            Unjudged(reply.reason)
            if isinstance(reply, NoReply)
            else Meaning(name=one.name, text=questions.read_meaning(reply) or "")
            for one, reply in zip(exemplars, replies, strict=True)
        ]

    def fires(
        self, meanings: Sequence[Meaning], passages: Sequence[Sequence[Passage]]
    ) -> list[Float[ndarray, " N"] | Unjudged]:
        """For each meaning 1 for those of its passages in which the model says that the feature fires, 0 for others.

        Raises:
            UserError: as `explain`.
        """
        size = self.config.passages
        parts = [
            (place, meaning, several[start : start + size])
            for place, (meaning, several) in enumerate(zip(meanings, passages, strict=True))
            for start in range(0, len(several), size)
        ]
        replies: list[str | NoReply] = [""] * len(parts)
        # By the length it is known whether a reply names passages that are there.
        for length in sorted({len(part) for _, _, part in parts}, reverse=True):
            places = [i for i, (_, _, part) in enumerate(parts) if len(part) == length]
            asked = [self._request(*questions.fires_question(*parts[i][1:])) for i in places]
            useful = partial(_names_passages, length)
            for place, reply in zip(places, self.client.ask(asked, useful=useful), strict=True):
                replies[place] = reply
        found: list[Float[ndarray, " N"] | Unjudged] = [np.zeros(0)] * len(meanings)
        for (place, _, part), reply in zip(parts, replies, strict=True):
            before = found[place]
            if isinstance(before, Unjudged):
                continue
            if isinstance(reply, NoReply):
                found[place] = Unjudged(reply.reason)
            else:
                numbers = questions.read_numbers(reply, len(part)) or []
                found[place] = np.concatenate([before, np.isin(np.arange(len(part)), numbers).astype(float)])
        return found

    def rate(self, texts: Sequence[ToRate]) -> list[Rating | Unjudged]:
        """The scores of texts, in order, each asked for by itself. A blank text scores 0 and is not sent.

        Raises:
            UserError: as `explain`.
        """
        written = [one for one in texts if one.text.strip()]
        asked = [self._request(*question) for one in written for question in questions.rating_questions(one)]
        replies = iter(self.client.ask(asked, useful=lambda reply: questions.read_rating(reply) is not None))
        return [
            self._rating([next(replies) for _ in Rating._fields]) if one.text.strip() else Rating(0.0, 0.0, 0.0)
            for one in texts
        ]

    @property
    def left(self) -> float:
        """Of the budget, in the currency of the prices; infinite if there is none."""
        return math.inf if self.config.budget is None else self.config.budget - self.client.spent

    def cost(self, texts: Sequence[ToRate]) -> float:
        """What rating some texts costs at most, in the currency of the prices, if each reply is of use."""
        asked = [question for one in texts for question in questions.rating_questions(one)]
        return self.client.cost(self._request(*question) for question in asked)

    def _rating(self, replies: Sequence[str | NoReply]) -> Rating | Unjudged:
        gaps = [reply.reason for reply in replies if isinstance(reply, NoReply)]
        if gaps:
            return Unjudged(gaps[0])
        return Rating(*(float(questions.read_rating(str(reply)) or 0) for reply in replies))

    def _request(self, instruction: str, question: str) -> dict[str, Any]:
        return self.request(instruction, question, max_tokens=self.config.max_tokens)


def _names_passages(count: int, reply: str) -> bool:
    return questions.read_numbers(reply, count) is not None
