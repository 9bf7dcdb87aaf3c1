"""Test 3 of Makelov, Lange and Nanda 2024: do features fire where an attribute has a value, and is that what they do?

A feature says a predicate as well as its F1: of {f > 0} against the prompts of which the predicate holds. A feature may
say several names at once; the best union of up to ten is searched exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.tasks.ioi_prompts import IOIPrompt

INTERPRETABLE = 0.6
"""F1 from which on a feature counts as interpretable, as in the paper."""
MOST_NAMES = 10


class Predicates(NamedTuple):
    """Binary statements about P prompts."""

    names: tuple[str, ...]  # such as `IO=Mary`, `IO=Mary, Pos=ABB`, `Pos=ABB`, `S gender=F`, `named Mary`
    groups: tuple[str, ...]  # per predicate what may be joined: those of one group are about different names
    truth: Tensor  # [P, K]

    @classmethod
    def of(cls, prompts: Sequence[IOIPrompt]) -> Predicates:
        """All predicates that hold of some of the prompts and not of all."""
        holds = [_statements(prompt) for prompt in prompts]
        groups = {name: group for said in holds for name, group in said.items()}
        names = sorted(groups)
        truth = torch.tensor([[name in own for name in names] for own in holds])
        some = truth.any(0) & ~truth.all(0)
        kept = [name for name, keep in zip(names, some.tolist(), strict=True) if keep]
        return cls(tuple(kept), tuple(groups[name] for name in kept), truth[:, some])

    def hold(self, prompts: Sequence[IOIPrompt]) -> Bool[Tensor, "Q K"]:
        """Which of them hold of other prompts."""
        holds = [_statements(prompt) for prompt in prompts]
        return torch.tensor([[name in own for name in self.names] for own in holds])


def _statements(prompt: IOIPrompt) -> dict[str, str]:
    """What holds of a prompt, each with its group."""
    own = prompt.attributes
    said = {f"Pos={own['Pos']}": "Pos"}
    for role in ("IO", "S"):
        said[f"{role}={own[role]}"] = role
        said[f"{role}={own[role]}, Pos={own['Pos']}"] = f"{role}, Pos={own['Pos']}"
        said[f"named {own[role]}"] = "named"
        gender = f"{role} gender"
        if gender in own:
            said[f"{gender}={own[gender]}"] = gender
    return said


def f1_scores(fires: Bool[Tensor, "P n"], truth: Bool[Tensor, "P K"]) -> Float[Tensor, "n K"]:
    """F1 of each feature's firing against each predicate; 0 for features that never fire."""
    hits = fires.float().T @ truth.float()
    return 2 * hits / (fires.sum(0)[:, None] + truth.sum(0)).clamp_min(1)


class Meaning(NamedTuple):
    """What a feature says best."""

    f1: float
    predicates: tuple[str, ...]  # one, or several names of one group


def best_meanings(fires: Bool[Tensor, "P n"], predicates: Predicates, most: int = MOST_NAMES) -> list[Meaning]:
    """Per feature the predicate, or the union of predicates of a group, with the largest F1.

    Only names are joined: a union of both values of Pos would hold of every prompt. The union is
    exact: F1 = 2 Σ hits / (fires + Σ true) over a set of at most `most` disjoint predicates is a ratio of sums, whose
    maximum is where max Σ (2 hits − λ true) = λ fires (Dinkelbach 1967).

    Args:
        fires: on P prompts.
        predicates: of the same prompts; those named (`named Mary`), which overlap, are not joined.
        most: names of a union, which never holds all.
    """
    hits = fires.double().T @ predicates.truth.double()
    times, true = fires.sum(0).double(), predicates.truth.sum(0).double()
    best = [Meaning(0.0, ()) for _ in times]
    for group in dict.fromkeys(predicates.groups):
        index = torch.tensor([i for i, name in enumerate(predicates.groups) if name == group])
        limit = max(1, min(most, len(index) - 1)) if group.partition(",")[0] in ("IO", "S") else 1
        found, chosen = _best_union(hits[:, index], true[index], times, limit)
        for feature, score in enumerate(found.tolist()):
            if score > best[feature].f1:
                members = index[chosen[feature]].tolist()
                best[feature] = Meaning(score, tuple(predicates.names[i] for i in members))
    return best


def _best_union(
    hits: Float[Tensor, "n K"], true: Float[Tensor, " K"], times: Float[Tensor, " n"], most: int
) -> tuple[Float[Tensor, " n"], Bool[Tensor, "n K"]]:
    """The largest F1 and the set that has it."""
    score = torch.zeros_like(times)
    chosen = torch.zeros_like(hits, dtype=torch.bool)
    while True:
        gain = 2 * hits - score[:, None] * true
        top, index = gain.topk(min(most, gain.shape[1]), dim=1)
        now = torch.zeros_like(chosen).scatter_(1, index, top > 0)
        after = 2 * (hits * now).sum(1) / (times + (true * now).sum(1)).clamp_min(1)
        better = after > score + 1e-12
        if not better.any():
            return score, chosen
        score, chosen = torch.where(better, after, score), torch.where(better[:, None], now, chosen)


def interpretable(
    fires: Bool[Tensor, "Q n"], meanings: Sequence[Meaning], predicates: Predicates, holds: Bool[Tensor, "Q K"]
) -> Bool[Tensor, " n"]:
    """Features whose meaning, chosen on other prompts, has an F1 of 0.6 here, and more than firing always would have.

    Args:
        fires: on Q prompts that chose nothing.
        meanings: of `best_meanings`.
        predicates: among which they were chosen.
        holds: which of these hold of the Q prompts.
    """
    number = {name: i for i, name in enumerate(predicates.names)}
    chosen = torch.zeros(len(meanings), len(predicates.names))
    for feature, meaning in enumerate(meanings):
        chosen[feature, [number[name] for name in meaning.predicates]] = 1
    true = holds.float() @ chosen.T > 0  # [Q, n]
    share = true.float().mean(0)
    f1 = 2 * (fires & true).sum(0) / (fires.sum(0) + true.sum(0)).clamp_min(1)
    return (f1 >= INTERPRETABLE) & (f1 > 2 * share / (1 + share))


def kept_and_removed(
    dictionary: Dictionary, x: Float[Tensor, "P width"], keep: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, "P width"], Float[Tensor, "P width"]]:
    """The causal check: reconstructions by some features alone, and activations without them.

    The authors' code keeps beside those features what the dictionary does not reconstruct; here nothing else is kept.

    Args:
        dictionary: the dictionary.
        x: activations.
        keep: the features, such as those with an F1 of 0.6 or more.
    """
    f = dictionary.encode(x) * keep
    return dictionary.rebuild(f, x), x - (f @ dictionary.W_dec.detach()) * dictionary.code_unit(x)


def value_scores(
    f1: Float[Tensor, "n K"], predicates: Predicates, attribute: str, prompts: Sequence[IOIPrompt]
) -> Float[Tensor, "P n"]:
    """Per prompt each feature's F1 for the value that the prompt has of an attribute, as `edit_by_meaning` takes it.

    Raises:
        UserError: no predicate is about a value.
    """
    number: Mapping[str, int] = {name: i for i, name in enumerate(predicates.names)}
    values = [f"{attribute}={prompt.attributes[attribute]}" for prompt in prompts]
    missing = next((value for value in values if value not in number), None)
    if missing is not None:
        hint = "take predicates of prompts of which some have it and some do not"
        raise UserError(f"value {missing}", "no predicate is about it", hint)
    return torch.stack([f1[:, number[value]] for value in values])
