"""Labelled texts for an evaluation: which examples are fitted on, which are reported, and what is resampled.

Probes, directions and means are fitted on some prompts and everything is reported on others, so that no prompt is on
both sides. Where examples share a few neutral prompts, a prompt is no unit: then examples are divided, and resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.flags.examples import LEAST, Encoded, Example, check_names, encode
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.runs import split_ids, text_id

SALT = "flags evaluation"
"""Of the division of prompts."""
REPORTED = 1 / 3
"""Share of the prompts that is reported; the others are fitted on."""
LEAST_PROMPTS = 20
"""With fewer different prompts, examples are the unit."""
Unit = Literal["prompt", "example"]


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Examples with their tokens and labels."""

    examples: tuple[Example, ...]
    tokens: tuple[Encoded, ...]
    labels: Bool[NDArray[np.bool_], "N C"]
    unit: Int[NDArray[np.int64], " N"]
    """Number of what is resampled: the prompt, or the example."""

    def __len__(self) -> int:
        return len(self.examples)

    def first(self, n: int) -> LabelledTexts:
        """The first n examples; kinds of labels take turns, so that each is there."""
        return LabelledTexts(self.examples[:n], self.tokens[:n], self.labels[:n], self.unit[:n])

    def take(self, which: Sequence[int]) -> LabelledTexts:
        """Some of the examples."""
        index = list(which)
        examples, tokens = tuple(self.examples[i] for i in index), tuple(self.tokens[i] for i in index)
        return LabelledTexts(examples, tokens, self.labels[index], self.unit[index])

    def by_length(self, batch_size: int) -> list[list[int]]:
        """Numbers of examples in batches, those of like length together."""
        order = sorted(range(len(self)), key=lambda i: len(self.tokens[i].ids))
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class EvaluationTexts(NamedTuple):
    """Examples to fit on, examples to report, and by what they were divided."""

    fitted: LabelledTexts
    reported: LabelledTexts
    unit: Unit


def evaluation_texts(
    model: LanguageModel,
    flags: FlagSpec,
    examples: Sequence[Example],
    *,
    fit_items: int,
    items: int,
    chat: bool,
    max_tokens: int,
) -> EvaluationTexts:
    """Divide examples by their prompts, or by themselves where there are fewer than 20 prompts.

    Args:
        model: gives the tokenizer.
        flags: give the concepts.
        examples: that no model was trained on.
        fit_items: at most so many are fitted on.
        items: at most so many are reported.
        chat, max_tokens: as in `FlagTraining`.

    Raises:
        UserError: too few examples of a side have a concept or lack it; the message names it.
    """
    for example in examples:
        check_names(example, flags.concepts)
    known = {_id(example): example for example in examples}
    prompts = {text_id(example.prompt) for example in examples}
    unit: Unit = "prompt" if len(prompts) >= LEAST_PROMPTS else "example"
    of = {id_: text_id(example.prompt) if unit == "prompt" else id_ for id_, example in known.items()}
    sides = split_ids(dict.fromkeys(of.values()), {"fitted": 1 - REPORTED, "reported": REPORTED}, SALT)
    numbers = {name: i for i, name in enumerate(sorted(set(of.values())))}
    found: list[LabelledTexts] = []
    for side, count in (("fitted", fit_items), ("reported", items)):
        members = set(sides[side])
        chosen = _in_turn({id_: known[id_] for id_, one in of.items() if one in members}, count)
        texts = tuple(known[id_] for id_ in chosen)
        labels = flags.labels([example.concepts for example in texts]).numpy() > 0.5
        _check_both_kinds(labels, flags.concepts, side)
        tokens = tuple(encode(model, texts, chat=chat, max_tokens=max_tokens))
        found.append(LabelledTexts(texts, tokens, labels, np.array([numbers[of[id_]] for id_ in chosen])))
    return EvaluationTexts(found[0], found[1], unit)


def _id(example: Example) -> str:
    return text_id(f"{example.prompt}\0{example.response}")


def _in_turn(examples: dict[str, Example], n: int) -> list[str]:
    """Ids of at most n examples; the kinds of labels take turns, each in the order of its ids."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for id_ in sorted(examples):
        kinds.setdefault(tuple(sorted(examples[id_].concepts)), []).append(id_)
    turns = zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    return [id_ for turn in turns for id_ in turn if id_ is not None][:n]


def _check_both_kinds(labels: Bool[NDArray[np.bool_], "N C"], concepts: Sequence[str], side: str) -> None:
    for concept, having in zip(concepts, labels.sum(axis=0).tolist(), strict=True):
        for n, verb in ((having, "have"), (len(labels) - having, "lack")):
            if n < LEAST:
                why = f"{n} of the {len(labels)} examples that are {side} {verb} it, and {LEAST} are needed"
                raise UserError(f"concept {concept!r}", why, "give more examples")
