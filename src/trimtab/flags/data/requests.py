"""What a model is asked to write, and under which prompt that is kept: a plan that depends on nothing but the seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np

from trimtab.errors import UserError
from trimtab.flags.data.prompts import FRAMES, PAIR_FRAMES, everyday_topics, framed, neutral, topics

SEVERAL, NONE = "several", "none"
"""Groups of responses beside those of one concept."""
GROUP = 1_000_000
"""Apart are the keys of the groups' random draws."""


class Request(NamedTuple):
    """One response to write."""

    group: str
    """A concept, `several` or `none`."""
    concepts: tuple[str, ...]
    """It needs these."""
    prompt: str
    """What the model is asked."""
    kept_prompt: str
    """What the example says it was asked: the same, or a neutral one."""
    sample: int
    """Key of its random draws."""


@dataclass(frozen=True)
class Requests:
    """All requests, by group and number.

    Args:
        concepts: names with descriptions.
        neutral_share: share of the requests that are kept under a neutral prompt.
        seed: of frames, topics and prompts.

    Raises:
        UserError: a concept has the name of a group.
    """

    concepts: Mapping[str, str]
    neutral_share: float
    seed: int

    def __post_init__(self) -> None:
        for name in (SEVERAL, NONE):
            if name in self.concepts:
                raise UserError(f"concept {name!r}", "responses of several concepts or none are called so", "rename it")

    @property
    def groups(self) -> list[str]:
        """Concepts, then `several` where there are two, and `none`."""
        return [*self.concepts, *[SEVERAL] * (len(self.concepts) > 1), NONE]

    @cached_property
    def neutral(self) -> list[str]:
        """Prompts that name no concept."""
        return neutral(self.concepts)

    @cached_property
    def everyday(self) -> list[str]:
        """Topics of texts that need none."""
        return everyday_topics(self.concepts)

    def request(self, group: str, number: int) -> Request:
        """The request of a group with a number."""
        place = self.groups.index(group)
        rng = np.random.default_rng([self.seed, place, number])
        if group == NONE:
            concepts: tuple[str, ...] = ()
            if rng.random() < 0.2 or not self.everyday:
                prompt = _one(rng, self.neutral)
            else:
                prompt = framed(_one(rng, FRAMES), _one(rng, self.everyday))
        elif group == SEVERAL:
            pairs = list(combinations(self.concepts, 2))
            concepts = pairs[number % len(pairs)]
            asked = [_one(rng, topics(self.concepts[name])) for name in rng.permutation(concepts)]
            prompt = framed(_one(rng, PAIR_FRAMES), *asked)
        else:
            concepts = (group,)
            listed = topics(self.concepts[group])
            n = min(len(listed), 3 if rng.random() < 0.5 else 1)
            *first, last = rng.permutation(listed)[:n].tolist()
            prompt = framed(_one(rng, FRAMES), f"{', '.join(first)} and {last}" if first else last)
        kept = _one(rng, self.neutral) if rng.random() < self.neutral_share else prompt
        return Request(group, concepts, prompt, kept, place * GROUP + number)


def _one(rng: np.random.Generator, texts: list[str] | tuple[str, ...]) -> str:
    return str(texts[int(rng.integers(len(texts)))])
