"""A policy's rollouts on some items, beside the unsteered model's, as all analyses read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray

from trimtab.control.task_prompts import TaskPrompts
from trimtab.lm import DecodeConfig, Decoded, InterventionSource, decode
from trimtab.policies.networks import Policy
from trimtab.policies.rollout import roll_out
from trimtab.policies.setup import Setup
from trimtab.policies.source import Decisions, PolicySource
from trimtab.tasks import Outcome

HIDDEN = "[hidden: the task holds harmful prompts]"


@dataclass(frozen=True, kw_only=True)
class PolicyRollouts:
    """One rollout of each item; row i is item i, its draws have the key i and branch 0."""

    setup: Setup
    policy: Policy
    greedy: bool
    prompts: TaskPrompts
    source: PolicySource
    """What made the rollouts; names sites and directions."""
    decoded: Decoded
    outcomes: tuple[Outcome, ...]
    decisions: Decisions
    unsteered: tuple[Outcome, ...]

    @classmethod
    def of(cls, setup: Setup, policy: Policy, prompts: TaskPrompts, *, greedy: bool = True) -> PolicyRollouts:
        """Roll the policy out once over all items, and the unsteered model."""
        source = setup.source(policy, greedy=greedy)
        found, unsteered = (
            roll_out(
                setup.model, one, prompts, seed=setup.seed, temperature=setup.temperature,
                batch_size=setup.batch_size, prompt_cache=setup.prompt_cache,
            )
            for one in (source, None)
        )  # fmt: skip
        return cls(
            setup=setup,
            policy=policy,
            greedy=greedy,
            prompts=prompts,
            source=source,
            decoded=found.decoded,
            outcomes=tuple(found.outcomes),
            decisions=source.decisions,
            unsteered=tuple(unsteered.outcomes),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def hides_text(self) -> bool:
        """Whether the items' texts must not be shown."""
        return self.prompts.task.hides_text

    @property
    def steps(self) -> NDArray[np.intp]:
        """Decisions of each item."""
        return np.array([len(ids) for ids in self.decoded.token_ids])

    def ids(self, item: int) -> list[int]:
        """Tokens of an item's prompt and answer."""
        return [*self.prompts.ids[item], *self.decoded.token_ids[item]]

    def position(self, item: int, step: int) -> int:
        """Where the token is that a decision edits; the one that is chosen there follows it."""
        return len(self.prompts.ids[item]) - 1 + step

    def text(self, ids: Sequence[int]) -> str:
        """Text of some of the items' tokens, or a note in its place."""
        return HIDDEN if self.hides_text else self.setup.model.decode_continuation(ids, special=True)

    def decode_again(
        self, source: InterventionSource, which: Sequence[int], *, step: int = 0, repeats: int = 1
    ) -> tuple[Decoded, list[Outcome]]:
        """Decode items again from a step on, tokens before it given, with the draws of the first time.

        Args:
            source: what steers.
            which: items.
            step: the first decision that is free.
            repeats: rows per item.
        """
        setup, prompts = self.setup, self.prompts.take(which)
        decoded = decode(
            setup.model,
            prompts.ids,
            DecodeConfig(
                max_new_tokens=prompts.max_new_tokens - step,
                temperature=setup.temperature,
                seed=setup.seed,
                batch_size=max(repeats, setup.batch_size),
            ),
            source,
            forced=[self.decoded.token_ids[i][:step] for i in which] if step else None,
            repeats=repeats,
            samples=list(which),
            branches=[0] * (len(which) * repeats),
            allowed=prompts.allowed,
            prompt_cache=setup.prompt_cache,
        )
        return decoded, prompts.outcomes(decoded)


def rewards(outcomes: Sequence[Outcome]) -> NDArray[np.float64]:
    """`[P]`"""
    return np.array([outcome.reward for outcome in outcomes], dtype=np.float64)


def right(outcomes: Sequence[Outcome]) -> Bool[np.ndarray, " P"]:
    """Which answers are right; where a task has no right and wrong, those with a reward above ½."""
    return np.array([o.reward > 0.5 if o.correct is None else o.correct for o in outcomes], dtype=bool)


def spread(n: int, count: int) -> list[int]:
    """At most `count` numbers below n, evenly spaced, both ends included."""
    return sorted(set(np.linspace(0, n - 1, min(n, count)).round().astype(int).tolist()))


def as_numpy(values: torch.Tensor) -> NDArray[np.float64]:
    return values.detach().double().cpu().numpy()
