"""What a wish is measured on: examples, each a few prompts with answers, and a score of the answers' log-probabilities.

Whatever a wish is stated by, gradient and exact stage see nothing but these.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.control.task_prompts import TaskPrompts
from trimtab.errors import UserError
from trimtab.finding.options import LEAST, SPLITS
from trimtab.lm import LanguageModel
from trimtab.runs import text_id
from trimtab.tasks.tokens import encode

SALT = "trimtab.finding"
_TINY = 1e-6
"""In nats: a probability of a set of answers is kept so far below 1 that its log-odds are finite."""


class Ask(NamedTuple):
    """What stands before an answer."""

    text: str
    """Of the prompt, or of the last user turn; empty for the token that begins a text."""
    chat: bool = False
    """Whether it is a user turn in the model's chat template."""
    before: tuple[tuple[str, str], ...] = ()
    """Roles and contents of the turns before it, in a chat."""

    def ids(self, model: LanguageModel, instruction: str = "") -> tuple[int, ...]:
        """Token ids, with an instruction before the text if there is one."""
        text = f"{instruction}\n\n{self.text}".strip() if instruction else self.text
        if self.chat:
            turns = [*self.before, ("user", text)]
            return tuple(model.encode_chat([{"role": role, "content": content} for role, content in turns]))
        return tuple(model.encode_text(text)) if text else (first_token(model),)

    def answer_ids(self, model: LanguageModel, answer: str) -> tuple[int, ...]:
        """Token ids of an answer behind it; a blank stands between the two where neither has one."""
        if self.chat:
            return tuple(model.encode_continuation(answer))
        if not self.text:
            return tuple(encode(model.tokenizer, answer))
        gap = "" if self.text[-1].isspace() or answer[:1].isspace() else " "
        before, whole = model.encode_text(self.text), model.encode_text(self.text + gap + answer)
        joined = whole[: len(before)] == before
        return tuple(whole[len(before) :] if joined else model.encode_continuation(gap + answer))


def first_token(model: LanguageModel) -> int:
    """The token that begins a text, or else the one that ends the text before.

    Raises:
        UserError: the tokenizer has neither.
    """
    for token in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UserError("texts without a prompt", f"{model.name} has no token that begins one", "give a prompt")


class Answered(NamedTuple):
    """A prompt with an answer, in token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


Score = Callable[[Tensor], Tensor]
"""From log-probabilities `[..., S]` of S answers, each summed over its tokens, to `[...]`; more is more wished for."""


@dataclass(frozen=True)
class WeightedSum:
    """Σ weight · log-probability: log-odds of an answer against another, or texts' log-likelihoods per token."""

    weights: tuple[float, ...]
    offset: float = 0.0

    def __call__(self, logp: Float[Tensor, "... S"]) -> Float[Tensor, ...]:
        return (logp * torch.tensor(self.weights, dtype=logp.dtype, device=logp.device)).sum(-1) + self.offset


@dataclass(frozen=True)
class LogOdds:
    """Log-probability of some answers together, minus that of the others; of all else if there are no others."""

    wanted: tuple[bool, ...]

    def __call__(self, logp: Float[Tensor, "... S"]) -> Float[Tensor, ...]:
        parts = []
        for kind in (True, False):
            places = [i for i, one in enumerate(self.wanted) if one == kind]
            parts.append(torch.logsumexp(logp[..., places], -1) if places else None)
        more, less = (None if part is None else part.clamp_max(-_TINY) for part in parts)
        if more is None or less is None:
            known = less if more is None else more
            assert known is not None
            odds = known - torch.log(-torch.expm1(known))
            return odds if less is None else -odds
        return more - less


@dataclass(frozen=True)
class ExpectedReward:
    """Mean reward of answers that are drawn among all S of them, by their probabilities."""

    rewards: tuple[float, ...]

    def __call__(self, logp: Float[Tensor, "... S"]) -> Float[Tensor, ...]:
        rewards = torch.tensor(self.rewards, dtype=logp.dtype, device=logp.device)
        return (logp.softmax(-1) * rewards).sum(-1)


@dataclass(frozen=True)
class Example:
    """One unit of all intervals."""

    id: str
    """Made from its content: it says which split it is in."""
    answered: tuple[Answered, ...]
    score: Score
    asks: tuple[Ask, ...]
    """What stands before each answer, for instructions; as many as answers."""

    def weights(self, logp: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """How the score depends on each answer at these log-probabilities: above 0 for what is wanted."""
        with torch.enable_grad():
            given = logp.detach().clone().requires_grad_()
            (found,) = torch.autograd.grad(self.score(given), given)
        return found


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A wish's examples, tokenised for a model."""

    kind: str
    """`texts`, `contrast`, `words` or `task`."""
    unit: str
    """What effects are in."""
    examples: tuple[Example, ...]
    wanted: Mapping[str, str] = field(default_factory=dict)
    """By example, what has the property, as text that a judge may be fitted on."""
    unwanted: Mapping[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    """Words to be written, where the wish is that."""
    less: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    """What prompting tries."""
    notes: tuple[str, ...] = ()
    """What was cut, left out or read in a special way."""
    decoding: TaskPrompts | None = None
    """Items, one for each example in order, whose answers must be decoded to be rewarded."""
    reader: TaskPrompts | None = None
    """Items of a task, one for each example in order, whose metric is read in generated answers."""

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, which: Sequence[int]) -> Examples:
        """Some of them."""
        parts = {name: None if (items := getattr(self, name)) is None else items.take(which) for name in _ITEMS}
        return replace(self, examples=tuple(self.examples[i] for i in which), **parts)

    @property
    def answered(self) -> list[Answered]:
        """All prompts with answers, example after example."""
        return [one for example in self.examples for one in example.answered]

    def scores(self, logp: Float[Tensor, "... S"]) -> Float[Tensor, "... X"]:
        """Every example's score from the log-probabilities of `answered`."""
        found, start = [], 0
        for example in self.examples:
            stop = start + len(example.answered)
            found.append(example.score(logp[..., start:stop]))
            start = stop
        return torch.stack(found, -1)


_ITEMS = ("decoding", "reader")


def divide(examples: Examples, most: Sequence[int]) -> dict[str, Examples]:
    """Three splits, consecutive in the order of a hash of each example's id, so that they do not depend on the order
    given.

    Args:
        examples: all of them.
        most: examples of each split that are used at most; their proportions are the splits' shares.

    Raises:
        UserError: an id occurs twice, or there are too few examples; the message says how many are needed.
    """
    place = {example.id: i for i, example in enumerate(examples.examples)}
    if len(place) < len(examples):
        raise UserError("the examples", "one is given twice, so that it could be in two splits", "give each once")
    check_enough(len(examples), most, [note for note in examples.notes if "left out" in note])
    ordered, bounds = sorted(place, key=lambda id_: text_id(f"{SALT} {id_}")), _bounds(len(place), most)
    return {
        name: examples.take([place[id_] for id_ in ordered[a:b][:n]])
        for name, (a, b), n in zip(SPLITS, itertools.pairwise(bounds), most, strict=True)
    }


def check_enough(count: int, most: Sequence[int], notes: Sequence[str] = ()) -> None:
    """Raise a `UserError` that says how many are needed, if so many examples are too few to be divided.

    Args:
        count: examples.
        most: as for `divide`.
        notes: what the message says beside their number.
    """
    sizes = _sizes(count, most)
    for name in SPLITS:
        if sizes[name] < LEAST[name]:
            needed = next(n for n in itertools.count(count + 1) if _are_enough(n, most))
            counts = ", ".join(f"{size} {each}" for each, size in sizes.items())
            why = f"they make {counts}; at least {LEAST[name]} are needed for {name}"
            raise UserError(f"{count} examples{''.join(f' ({note})' for note in notes)}", why, f"give {needed} or more")


def _sizes(count: int, most: Sequence[int]) -> dict[str, int]:
    return {name: b - a for name, (a, b) in zip(SPLITS, itertools.pairwise(_bounds(count, most)), strict=True)}


def _are_enough(count: int, most: Sequence[int]) -> bool:
    return all(size >= LEAST[name] for name, size in _sizes(count, most).items())


def _bounds(count: int, most: Sequence[int]) -> list[int]:
    """Where the splits of so many examples begin and end."""
    return [round(count * n / sum(most)) for n in (0, *itertools.accumulate(most))]
