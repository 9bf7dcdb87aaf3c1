"""Which texts become examples: none twice, none nearly alike, as many of each concept, some of none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trimtab.errors import UserError
from trimtab.flags.data.prompts import NEUTRAL_PROMPTS, neutral
from trimtab.flags.dividing import is_held_out
from trimtab.flags.examples import Example
from trimtab.tasks.near_duplicates import first_of_each

POOL = 3
"""So many times the texts that are wanted of a concept are compared with each other."""


class Candidate(NamedTuple):
    """A text that may become an example."""

    text: str
    concepts: tuple[str, ...]
    source: str
    """What it was cut from: texts of one source are never both in the examples and in the judge's."""
    prompt: str = ""
    unit: str | None = None
    """As in `Example`."""


def without_copies(candidates: Sequence[Candidate], dropped: Counter[str]) -> list[Candidate]:
    """Candidates without those that were there before, blanks and capitals aside.

    A text that is there with other concepts, too, is left out altogether: one of the labels is wrong.
    """
    labels: dict[str, set[tuple[str, ...]]] = {}
    for one in candidates:
        labels.setdefault(_plain(one.text), set()).add(one.concepts)
    found: dict[str, Candidate] = {}
    for one in candidates:
        plain = _plain(one.text)
        if len(labels[plain]) > 1:
            dropped["the same text under other labels"] += 1
        elif plain in found:
            dropped["a copy"] += 1
        else:
            found[plain] = one
    return list(found.values())


def select(
    candidates: Sequence[Candidate],
    concepts: Sequence[str],
    *,
    each: int,
    none_share: float,
    seed: int,
    dropped: Counter[str],
) -> list[Candidate]:
    """A balanced choice of candidates that are no near-duplicates of each other.

    Texts are taken in a random order, as long as each of their concepts is still wanted; those of several concepts
    first, so that they are not shut out by those of one. Texts of no concept are so many that they have their share;
    where there are no others, as many as are wanted of a concept.

    Args:
        candidates: no two with the same text.
        concepts: all names.
        each: how many of every concept.
        none_share: share of all that have no concept.
        seed: of the order.
        dropped: counts what is left out, by reason.
    """
    order = np.random.default_rng(seed).permutation(len(candidates))
    shuffled = sorted((candidates[i] for i in order), key=lambda one: -len(one.concepts))
    beside = none_share / (1 - none_share)
    n_none = math.ceil(each * len(concepts) * beside) if shuffled and shuffled[0].concepts else each
    pool = _up_to(POOL * each, POOL * n_none, shuffled)
    distinct = first_of_each([one.text for one in pool])
    alone = [one for one, kept in zip(pool, distinct, strict=True) if kept]
    found = _up_to(each, n_none, alone)
    having = sum(bool(one.concepts) for one in found)
    if having:
        found = _up_to(each, round(having * beside), found)
    dropped["nearly a copy"] += len(pool) - len(alone)
    dropped["not needed"] += len(candidates) - len(pool) + len(alone) - len(found)
    return found


def _up_to(each: int, none: int, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that come before `each` texts of one of their concepts, or `none` texts of no concept, are there."""
    taken = Counter[str]()
    found: list[Candidate] = []
    for one in candidates:
        if all(taken[name] < each for name in one.concepts) if one.concepts else taken[""] < none:
            found.append(one)
            taken.update(one.concepts or ("",))
    return found


def rarest(candidates: Sequence[Candidate], concepts: Sequence[str]) -> int:
    """How many candidates the rarest concept has that has any."""
    counts = Counter(name for one in candidates for name in one.concepts)
    return min((counts[name] for name in concepts if counts[name]), default=0)


def as_examples(candidates: Sequence[Candidate], concepts: Mapping[str, str], share: float, seed: int) -> list[Example]:
    """Candidates in a random order, with neutral prompts where they have none.

    Each set of concepts gets all prompts equally often, so that no prompt says anything of a concept; but passages of
    documents that are held out get prompts that are, and others the rest.

    Args:
        candidates: to become examples.
        concepts: names with descriptions.
        share: of prompts and documents that `flags train` is to hold out.
        seed: of the order and the prompts.
    """
    rng = np.random.default_rng([seed, 1])
    waiting: dict[object, list[str]] = {}
    found: list[Example] = []
    for i in rng.permutation(len(candidates)):
        one = candidates[i]
        prompt = one.prompt
        if not prompt:
            deck = deck_of(one, share)
            left = waiting.setdefault(deck, [])
            if not left:
                asked = [text for text in NEUTRAL_PROMPTS if is_held_out(text, share) == deck[1]]
                if not asked:
                    side = "held out" if deck[1] else "trained on"
                    raise UserError(f"holdout {share}", f"no neutral prompt would be {side}", "choose one like 0.1")
                prompts = neutral(concepts, asked)
                left += [prompts[j] for j in rng.permutation(len(prompts))]
            prompt = left.pop()
        found.append(Example(prompt=prompt, response=one.text, concepts=one.concepts, unit=one.unit))
    return found


def deck_of(one: Candidate, share: float) -> tuple[tuple[str, ...], bool]:
    """Among which candidates prompts are dealt equally often: its concepts, and whether it is held out."""
    return one.concepts, is_held_out(one.source, share)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
