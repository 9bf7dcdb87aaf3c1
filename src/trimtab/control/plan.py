"""How many answers a comparison asks for, at most, and how long they take: known before it starts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from trimtab.control.answers import ItemSet
from trimtab.control.arm import ArmKind, Choosing
from trimtab.control.dose_search import TRIES
from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts
from trimtab.lm import InterventionSource

TIMED = 16
"""Items by which answers are timed."""


class Pace(NamedTuple):
    """How long things take, in seconds."""

    prompt: float
    """Reading an item's prompt, once."""
    answer: float
    """An answer to a prompt that is known."""


class Plan(NamedTuple):
    """What a comparison is made of."""

    answers: dict[str, int]
    """Rows to decode, at most, by what they are for."""
    prompts: int
    """Prompts that the model reads."""

    @property
    def total(self) -> int:
        return sum(self.answers.values())

    def lines(self, pace: Pace) -> list[str]:
        """The plan in words, the largest parts first."""
        parts = sorted(self.answers.items(), key=lambda part: -part[1])
        reading = self.prompts * pace.prompt
        return [
            f"up to {self.total:,} answers, about {_time(reading + self.total * pace.answer)}",
            f"  reading {self.prompts:,} prompts: {_time(reading)}",
            *(f"  {what}: {n:,} answers, {_time(n * pace.answer)}" for what, n in parts if n),
        ]


def plan_comparison(
    kinds: Sequence[ArmKind],
    choosing: Choosing,
    test: int,
    *,
    trainings: int = 1,
    kl_items: int = 0,
    orders: int = 0,
    companions: int = 0,
) -> Plan:
    """Count what is asked for where every arm can be had and every search for a dose is a long one.

    Args:
        kinds: what is compared with the reference.
        choosing: training and validation items, and as many candidates as there will be.
        test: items that are reported on.
        trainings: of the reference.
        kl_items: validation items by which arms are scaled to equal divergence; 0 for no such arms.
        orders: further orders of the options.
        companions: items of companion tasks.
    """
    validation, found = len(choosing.validation), Counter[str]()
    found["the reference on validation"] = trainings * validation
    tried = Counter[str]()
    for kind in kinds:
        for what, n in kind.effort(choosing).items():
            tried[what] = max(tried[what], n * (trainings if kind.per_training else 1))
    found.update({f"choosing {what}": n for what, n in tried.items()})
    few = min(kl_items, validation)
    dose, kl = (sum(kind.draws for kind in kinds if match in kind.strengths) for match in ("dose", "kl"))
    found["matching dose and KL"] = trainings * (dose + few * (TRIES * kl + 1))
    own = {True: 1 + trainings, False: 0}  # arms at their own strength by whether they are main ones; these are both
    like = {True: 0, False: 0}  # arms at the reference's dose
    for kind in kinds:
        own[kind.main] += kind.draws * ("own" in kind.strengths) * (trainings if kind.per_training else 1)
        like[kind.main] += kind.draws * ("dose" in kind.strengths) * trainings
    equal_kl = trainings * kl if few else 0
    found["test items"] = test * (sum(own.values()) + sum(like.values()) + equal_kl)
    found["other orders of the options"] = orders * test * own[True]
    found["companion tasks"] = companions * (own[True] + like[True])
    return Plan(dict(found), len(choosing.train) + validation + test * (1 + orders) + companions)


def measure_pace(setting: Setting, prompts: TaskPrompts, source: InterventionSource | None = None) -> Pace:
    """Time a few items with caches of their own, so that nothing of it is left.

    Args:
        setting: as arms are compared in.
        prompts: items to answer.
        source: makes the setting's edits, in a setting with its own caches.
    """
    few = ItemSet.of(setting.with_own_caches(), prompts.take(range(min(TIMED, len(prompts)))))
    times: list[float] = []
    for steered in (None, source, source):
        began = time.perf_counter()
        few.answer(steered, kl=True)
        times.append((time.perf_counter() - began) / len(few))
    plain, first, again = times
    return Pace(prompt=plain + max(0.0, first - 2 * again), answer=again)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
