"""Which token an answer is, as the model would write it: one that continues what stands before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from trimtab.errors import UserError


class _HasEncode(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool) -> Any: ...


Tokenizer = _HasEncode | Callable[[str], Sequence[int]]
"""A tokenizer of transformers or tokenizers, or any function from text to token ids that adds none of its own."""


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    method = getattr(tokenizer, "encode", None)
    found: Any = method(text, add_special_tokens=False) if method is not None else tokenizer(text)  # type: ignore[operator]
    return [int(token) for token in getattr(found, "ids", found)]


def token_behind(tokenizer: Tokenizer, context: str, text: str) -> int | None:
    """The one token that a text is behind a context; None if it is several, or changes those before it."""
    before, whole = encode(tokenizer, context) if context else [], encode(tokenizer, context + text)
    return whole[-1] if len(whole) == len(before) + 1 and whole[: len(before)] == before else None


def continuation_token(tokenizer: Tokenizer, context: str, text: str) -> int:
    """The one token that a text is behind a context.

    Args:
        tokenizer: the model's.
        context: what stands before; its end suffices.
        text: what is written next, with a leading blank where one belongs.

    Raises:
        UserError: the text is not one token there.
    """
    token = token_behind(tokenizer, context, text)
    if token is None:
        raise UserError(
            f"option {text!r}",
            f"this tokenizer does not make it one token behind {context[-12:]!r}",
            "decode without restriction",
        )
    return token


def chat_answer_prefix(tokenizer: Tokenizer) -> tuple[str, str] | None:
    """What stands before a chat model's answer, and the blank with which its template begins the answer, if any.

    The template is asked itself: the text that begins the model's turn, compared with a turn that is already answered.

    Returns:
        The end of that text and the blank (`("…assistant\\n", "")`); None for a tokenizer without a chat template.
    """
    apply = getattr(tokenizer, "apply_chat_template", None)
    if apply is None or not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "Q"}]
    prefix = str(apply(turns, add_generation_prompt=True, tokenize=False))
    answered = str(apply([*turns, {"role": "assistant", "content": "Z"}], tokenize=False))
    between = answered.removeprefix(prefix).partition("Z")[0] if answered.startswith(prefix) else ""
    return prefix[-24:], between if between.isspace() else ""
