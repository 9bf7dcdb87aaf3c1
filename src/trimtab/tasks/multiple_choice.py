"""Questions that are answered with the letter of an option."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from trimtab.tasks.task import Item, Outcome, Task

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INSTRUCTION = "Answer with the letter of the correct option only."


class MultipleChoice(Task):
    """Base of tasks with lettered options. `Item.answer` is a letter in the benchmark's own order.

    The prompt ends with `Answer:`. In a chat the model's turn begins on a new line, so that the letter is a token
    without a blank (`A`); without a chat template it is one with a blank (` A`).
    """

    options_only: ClassVar[bool] = True

    def prompt(self, item: Item, permutation: int = 0) -> str:
        """Question, options, instruction and `Answer:`."""
        self._check_permutation(item, permutation)
        return f"{question_block(item, permutation)}\n\n{INSTRUCTION}\nAnswer:"

    def orders(self, item: Item) -> int:
        """One order per option."""
        return len(item.options)

    def option_strings(self, item: Item) -> tuple[str, ...]:
        """The letters."""
        return tuple(LETTERS[: len(item.options)])

    def correct_option(self, item: Item, permutation: int = 0) -> int:
        """Place of the right option among those shown."""
        return (LETTERS.index(item.answer) - permutation) % len(item.options)

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        """Reward 1 for the right letter, else 0. `Outcome.answer` is the letter in the benchmark's own order; the part
        `shown` is the place of the chosen letter as shown (0 for A), whose distribution gives the letter bias."""
        shown = read_letter(text, ordered_options(item, permutation))
        if shown is None:
            return Outcome(reward=0.0, correct=False, malformed=True)
        letter = LETTERS[(shown + permutation) % len(item.options)]
        correct = letter == item.answer
        return Outcome(reward=float(correct), correct=correct, answer=letter, parts={"shown": float(shown)})


def ordered_options(item: Item, permutation: int) -> tuple[str, ...]:
    """An item's options in a cyclic order: the option at `permutation` comes first."""
    return item.options[permutation:] + item.options[:permutation]


def question_block(item: Item, permutation: int = 0) -> str:
    """The question and its lettered options."""
    shown = ordered_options(item, permutation)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, shown, strict=False)]
    return "\n".join([item.prompt, *lines])


def read_letter(text: str, options: Sequence[str]) -> int | None:
    """Which option a text chooses, or None if that cannot be told.

    In this order: a capital letter at the beginning, alone or before punctuation or a line end (`B`, `(B)`,
    `**B.** …`); one letter after `answer is`, `answer:`, `option` or `choice`, if no other letter is named so; the text
    of exactly one option as the whole answer or as its beginning. A letter that no option has is no answer.
    """
    letters = LETTERS[: len(options)]
    first = re.match(r"[\s*_`\"'(\[]*([A-Z])(?=$|[\s*_`\"']*(?:$|[\n.,:;)\]]))", text)
    if first:
        letter = first.group(1)
        return letters.index(letter) if letter in letters else None
    named = set(re.findall(r"(?i:\b(?:answer|option|choice)(?: is)?:?)[\s*_`\"'(\[]*([A-Z])\b(?!')", text))
    if named:
        return letters.index(named.pop()) if len(named) == 1 and named <= set(letters) else None
    said = _plain(text)
    whole = [i for i, option in enumerate(options) if said == _plain(option)]
    continued = [
        i for i, option in enumerate(options) if _plain(option) and (said + " ").startswith(_plain(option) + " ")
    ]
    for found in (whole, continued):
        if len(found) == 1:
            return found[0]
    return None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))
