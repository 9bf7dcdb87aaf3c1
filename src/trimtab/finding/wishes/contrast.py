"""Prompts, each with an answer that is wanted and one that is not: the wish is the log-odds of the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import UserError
from trimtab.finding.examples import Answered, Ask, Example, Examples, WeightedSum
from trimtab.finding.wishes.wish import Wish
from trimtab.lm import LanguageModel
from trimtab.runs import text_id

KEYS = ("prompt", "wanted", "unwanted")
WORDS = 4
"""Answers of fewer words are no texts that a judge could read."""


@dataclass(frozen=True, kw_only=True)
class Contrast(Wish):
    """Prompts with wanted and unwanted answers.

    Raises:
        UserError: a row lacks a key or has a wrong value, or its answers are the same.
    """

    rows: tuple[Mapping[str, Any], ...]
    """Each with `prompt` (a text, or turns with `role` and `content`, the last the user's), `wanted` and `unwanted`."""
    chat: bool = False
    """Whether prompts that are texts are user turns in the model's chat template."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        if not self.rows:
            raise UserError("the contrast", "it has no row", "give some")
        for number, row in enumerate(self.rows, 1):
            what = f"row {number} of the contrast"
            if not isinstance(row, Mapping) or set(row) != set(KEYS):
                said = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
                raise UserError(what, f"it holds {said or 'nothing'}", f"give {', '.join(KEYS)}")
            for key in KEYS[1:]:
                if not isinstance(row[key], str) or not row[key].strip():
                    raise UserError(what, f"its {key} answer is no text", "give some text")
            if row["wanted"].strip() == row["unwanted"].strip():
                raise UserError(what, "its wanted and its unwanted answer are the same", "correct it")

    @property
    def most(self) -> int:
        return len(self.rows)

    def examples(self, model: LanguageModel) -> Examples:
        found: dict[str, tuple[Example, Mapping[str, Any]]] = {}
        for number, row in enumerate(self.rows, 1):
            ask = _ask(row["prompt"], self.chat, number)
            id_ = text_id(repr(ask))
            if id_ in found:
                continue
            prompt = ask.ids(model)
            answers = tuple(Answered(prompt, ask.answer_ids(model, row[key])) for key in KEYS[1:])
            if answers[0] == answers[1]:
                raise UserError(f"row {number} of the contrast", "its answers have the same tokens", "correct it")
            found[id_] = Example(id=id_, answered=answers, score=WeightedSum((1.0, -1.0)), asks=(ask, ask)), row
        dropped = len(self.rows) - len(found)
        texts = [
            {id_: row[key] for id_, (_, row) in found.items() if len(row[key].split()) >= WORDS} for key in KEYS[1:]
        ]
        return Examples(
            kind="contrast",
            unit="nats of log-odds",
            examples=tuple(example for example, _ in found.values()),
            wanted=texts[0],
            unwanted=texts[1],
            instructions=self.instruction,
            notes=(f"{dropped} rows whose prompt occurs before were left out",) * bool(dropped),
        )


def _ask(prompt: str | Sequence[Mapping[str, str]], chat: bool, number: int) -> Ask:
    """A row's prompt."""
    if isinstance(prompt, str) and prompt.strip():
        return Ask(prompt, chat)
    turns = [] if isinstance(prompt, str) else list(prompt)
    if not turns or not all(isinstance(t, Mapping) and set(t) == {"role", "content"} for t in turns):
        why = "its prompt is neither a text nor turns with role and content"
        raise UserError(f"row {number} of the contrast", why, 'give a text, or [{"role": "user", "content": "…"}]')
    if turns[-1]["role"] != "user":
        why = f"the last turn of its prompt is the {turns[-1]['role']}'s"
        raise UserError(f"row {number} of the contrast", why, "end with the user's")
    return Ask(turns[-1]["content"], True, tuple((turn["role"], turn["content"]) for turn in turns[:-1]))
