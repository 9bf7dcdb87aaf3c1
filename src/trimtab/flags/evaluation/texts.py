"""Labelled texts for an evaluation: which examples are fitted on, which are reported, and what is resampled.

Probes, directions and means are fitted on some documents and everything is reported on others, so that no document is
on both sides; where examples are no passages of documents, prompts take their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.flags.dividing import example_id
from trimtab.flags.examples import LEAST, Encoded, Example, check_names, encode
from trimtab.flags.measuring import Unit, units_of
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.runs import split_ids

SALT = "flags evaluation"
"""Of the division."""
REPORTED = 1 / 3
"""Share of documents or prompts that is reported; the others are fitted on."""


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Examples with their tokens and labels."""

    examples: tuple[Example, ...]
    tokens: tuple[Encoded, ...]
    labels: Bool[np.ndarray, "N C"]
    unit: NDArray[np.str_]
    """`[N]` what is resampled: the document, the prompt or the example."""

    def __len__(self) -> int:
        return len(self.examples)

    def first(self, n: int) -> LabelledTexts:
        """The first n examples; kinds of labels take turns, so that each is there."""
        return self.take(range(min(n, len(self))))

    def take(self, which: Sequence[int]) -> LabelledTexts:
        """Some of the examples, each as often as it is named."""
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
    """Divide examples by their documents or prompts, or by themselves where fewer than 20 of these differ.

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
    known = {example_id(example): example for example in examples}
    unit, units = units_of(list(known.values()))
    of = dict(zip(known, units, strict=True))
    sides = split_ids(dict.fromkeys(units), {"fitted": 1 - REPORTED, "reported": REPORTED}, SALT)
    found: list[LabelledTexts] = []
    for side, count in (("fitted", fit_items), ("reported", items)):
        members = set(sides[side])
        chosen = _in_turn({id_: known[id_] for id_, one in of.items() if one in members}, count)
        texts = tuple(known[id_] for id_ in chosen)
        labels = flags.labels([example.concepts for example in texts]).numpy() > 0.5
        _check_both_kinds(labels, flags.concepts, side)
        tokens = tuple(encode(model, texts, chat=chat, max_tokens=max_tokens))
        found.append(LabelledTexts(texts, tokens, labels, np.array([of[id_] for id_ in chosen])))
    return EvaluationTexts(found[0], found[1], unit)


def _in_turn(examples: dict[str, Example], n: int) -> list[str]:
    """Ids of at most n examples; the kinds of labels take turns, each in the order of its ids."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for id_ in sorted(examples):
        kinds.setdefault(tuple(sorted(examples[id_].concepts)), []).append(id_)
    turns = zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    return [id_ for turn in turns for id_ in turn if id_ is not None][:n]


def _check_both_kinds(labels: Bool[np.ndarray, "N C"], concepts: Sequence[str], side: str) -> None:
    for concept, having in zip(concepts, labels.sum(axis=0).tolist(), strict=True):
        for n, verb in ((having, "have"), (len(labels) - having, "lack")):
            if n < LEAST:
                why = f"{n} of the {len(labels)} examples that are {side} {verb} it, and {LEAST} are needed"
                hint = (
                    "give more examples that were not trained on (--data), or hold out more when training (--holdout)"
                )
                raise UserError(f"concept {concept!r}", why, hint)
