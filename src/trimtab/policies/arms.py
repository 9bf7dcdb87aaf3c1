"""A policy as an arm, and the same policy under a decoder whose rows are shuffled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from trimtab.control import arms  # registers what the shuffled policy stands among
from trimtab.control.answers import Answers, ItemSet
from trimtab.control.arm import Arm, ArmKind, Choosing, Match, answers_under, register
from trimtab.control.arms.random_features import draw_seed
from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.policies.networks import Policy
from trimtab.policies.setup import Setup
from trimtab.policies.source import PolicySource
from trimtab.steering import DirectionTable


@dataclass(frozen=True, kw_only=True)
class PolicyArm(ArmKind):
    """A trained policy, greedy."""

    name: ClassVar[str] = "policy"
    main: ClassVar[bool] = True
    per_training: ClassVar[bool] = True
    setup: Setup
    policy: Policy

    def source(self, scale: float = 1.0, directions: DirectionTable | None = None) -> PolicySource:
        """The policy as a source, its dose multiplied by a number."""
        dose = self.setup.dose * scale
        return self.setup.source(self.policy, greedy=True, directions=directions, dose=dose)

    def arms(self, choosing: Choosing) -> list[Arm]:
        return [self.arm(lambda items, scale: answers_under(items, [self.source(scale)]))]


@dataclass(frozen=True, kw_only=True)
class Shuffled(ArmKind):
    """The reference policy, its features' directions exchanged at random: what it does is right for no decoder."""

    name: ClassVar[str] = "shuffled"
    per_training: ClassVar[bool] = True
    strengths: ClassVar[tuple[Match, ...]] = ("dose", "kl")
    draws: int = 3
    """Repetitions."""

    def arms(self, choosing: Choosing) -> list[Arm]:
        reference = choosing.reference
        if not isinstance(reference, PolicyArm):
            raise UserError("a shuffled decoder", "only a policy can steer with one", "leave out shuffled")
        setup, policy = reference.setup, reference

        def answer(items: ItemSet, scale: float) -> list[Answers]:
            seeds = (draw_seed(setup.seed, draw) for draw in range(self.draws))
            return answers_under(items, (policy.source(scale, shuffled_table(setup.dictionary, s)) for s in seeds))

        return [self.arm(answer, {"draws": self.draws}, match=match, scheduled=True) for match in ("dose", "kl")]


register(Shuffled, before=arms.Vector.name)


def shuffled_table(dictionary: Dictionary, seed: int) -> DirectionTable:
    """The decoder with the rows of live features exchanged at random; what is not live stays where it is.

    Lengths stay with the features' numbers, so that doses in `max_activation` stay what they were.
    """
    table = DirectionTable.of(dictionary)
    live = table.live_ids()
    order = torch.from_numpy(np.random.default_rng([seed, 31]).permutation(len(live)))
    rows = table.rows.clone()
    rows[live.to(rows.device)] = table.rows[live[order].to(rows.device)]
    return DirectionTable(rows, max_activation=table.max_activation, live=table.live)
