"""Labelled examples: a prompt, the response to it, and the concepts that the response needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.errors import UserError, did_you_mean
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, TokenBatch
from trimtab.runs.user_files import json_lines, read_text

LEAST = 2
"""Examples that must have a concept, and as many that must lack it."""
LEAST_SHARE = 0.01
"""The same as a share of all examples."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt, a response, and the concepts that the response needs.

    Raises:
        UserError: a prompt, response or unit is empty or no text, or concepts are not a list of names.
    """

    prompt: str
    response: str
    concepts: tuple[str, ...] = ()
    unit: str | None = None
    """The document that the response is a passage of, if it is one: whole documents are held out."""

    def __post_init__(self) -> None:
        texts = {"prompt": self.prompt, "response": self.response}
        for name, text in (texts if self.unit is None else texts | {"unit": self.unit}).items():
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"the {name} of an example", "it is empty or no text", "give some text")
        if isinstance(self.concepts, str) or not all(isinstance(name, str) for name in self.concepts):
            raise UserError(f"concepts {self.concepts!r}", "they are a list of names", 'give them like ["sea"]')
        object.__setattr__(self, "concepts", tuple(self.concepts))


def read_examples(path: Path | str, concepts: Sequence[str]) -> list[Example]:
    """Examples of a JSONL file, each line with `prompt`, `response`, `concepts`, and `unit` where it is of a document.

    Args:
        path: the file.
        concepts: names that lines may use.

    Raises:
        UserError: the file cannot be read, or a line is not as it should be; the message says which.
    """
    names = [field.name for field in fields(Example)]
    needed = [name for name in names if name != "unit"]
    found: list[Example] = []
    for number, value in json_lines(read_text(path), str(path)):
        where = f"{path}, line {number}"
        if not isinstance(value, dict):
            raise UserError(where, "it is no JSON object", f"give {', '.join(needed)}")
        for name in value:
            if name not in names:
                raise UserError(
                    where, f"it has a field {name!r}", did_you_mean(name, names, f"give {', '.join(needed)}")
                )
        for name in needed:
            if name not in value:
                raise UserError(where, f"it has no {name}", "add it")
        if not isinstance(value["concepts"], list):
            raise UserError(where, "its concepts are no list", 'give them like ["sea"], or [] for none')
        try:
            found.append(Example(**value))
            check_names(found[-1], concepts)
        except UserError as error:
            raise UserError(where, f"{error.what}: {error.why}", error.hint) from None
    if not found:
        raise UserError(str(path), "it holds no example", "give lines of prompt, response and concepts")
    return found


def check_names(example: Example, concepts: Sequence[str]) -> None:
    """Raise a `UserError` if an example names a concept that is not among those given, or one twice."""
    for i, name in enumerate(example.concepts):
        if name not in concepts:
            why = f"the concepts are {', '.join(concepts)}"
            raise UserError(f"concept {name!r}", why, did_you_mean(name, concepts, "name one of them, or none"))
        if name in example.concepts[:i]:
            raise UserError(f"concept {name!r}", "it is named twice", "name it once")


def check_learnable(examples: Sequence[Example], concepts: Sequence[str]) -> None:
    """Raise a `UserError` that names a concept which too few examples have, or too few lack, to learn a flag."""
    for i, example in enumerate(examples):
        try:
            check_names(example, concepts)
        except UserError as error:
            raise UserError(f"example {i}: {error.what}", error.why, error.hint) from None
    least = max(LEAST, round(LEAST_SHARE * len(examples)))
    for concept in concepts:
        having = sum(concept in example.concepts for example in examples)
        for n, verb in ((having, "have"), (len(examples) - having, "lack")):
            if n < least:
                why = f"{n} of {len(examples)} examples {verb} it, and a flag is learned from at least {least}"
                raise UserError(f"concept {concept!r}", why, f"add examples that {verb} it, or leave the concept out")


class Encoded(NamedTuple):
    """An example as tokens."""

    ids: list[int]
    prompt_length: int


def encode(model: LanguageModel, examples: Sequence[Example], *, chat: bool, max_tokens: int) -> list[Encoded]:
    """Examples as tokens of prompt and response.

    Args:
        model: whose tokenizer is used.
        examples: what to encode.
        chat: the prompt is a user's turn, the response the model's, ended as the chat template ends it. Without it the
            response follows the prompt as it stands, and nothing ends it.
        max_tokens: responses are cut where an example has more.

    Raises:
        UserError: a prompt leaves no room for a response, a response gives no token, or a turn of a chat holds a
            special token.
    """
    end = end_of_turn(model) if chat else []
    found: list[Encoded] = []
    for i, example in enumerate(examples):
        prompt = model.encode_text(example.prompt, chat=chat)
        response = model.encode_continuation(example.response)
        if not response:
            raise UserError(f"example {i}", "its response gives no token", "give some text")
        if chat:
            model.check_no_special("assistant", example.response)
            response += end
        if len(prompt) >= max_tokens:
            why = f"its prompt has {len(prompt)} tokens, and an example may have {max_tokens}"
            raise UserError(f"example {i}", why, "shorten it, or raise max_tokens")
        found.append(Encoded((prompt + response)[:max_tokens], len(prompt)))
    return found


def end_of_turn(model: LanguageModel) -> list[int]:
    """The special token that a model's chat template writes behind its turn; without one, the end-of-text token."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    added = {id_ for id_, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    special = added | {*model.tokenizer.all_special_ids}
    written = model.decode_ids(model.encode_chat(turns, add_generation_prompt=False), special=True)
    behind = model.tokenizer(written.rpartition("Hello")[2], add_special_tokens=False)["input_ids"]
    usual = model.tokenizer.eos_token_id
    return [id_ for id_ in behind if id_ in special][:1] or ([usual] if isinstance(usual, int) else [])


class LabelledBatch(NamedTuple):
    """Examples side by side, padded on the left."""

    tokens: TokenBatch
    answer: Bool[Tensor, "B T"]
    """Where the response's tokens are."""
    labels: Float[Tensor, "B C"]

    @property
    def answer_length(self) -> int:
        """Tokens of the longest response; all responses are among the last so many places."""
        return int(self.answer.sum(dim=1).max())


def batch_of(
    model: LanguageModel, spec: FlagSpec, examples: Sequence[Example], encoded: Sequence[Encoded]
) -> LabelledBatch:
    """A `LabelledBatch` of examples and their tokens."""
    tokens = TokenBatch.pad([row.ids for row in encoded], model.pad_id, model.device)
    prompt = torch.tensor([row.prompt_length for row in encoded], device=model.device)
    answer = tokens.real & (tokens.position_ids >= prompt[:, None])
    labels = spec.labels([example.concepts for example in examples]).to(model.device)
    return LabelledBatch(tokens, answer, labels)
