"""Texts and tokens that stand behind others, with any tokenizer.

Tokenizers of the SentencePiece kind (Llama 2, Mistral) put a blank before every text that they encode and take one away
from every text that they decode, so that a piece by itself is not what it is within a text. Here pieces are encoded and
decoded behind a letter or a line's end that is then left out; where a tokenizer does no such thing, nothing changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import transformers


class Anchor(NamedTuple):
    """What pieces are put behind."""

    ids: list[int]
    text: str


def encode_plain(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text by itself, without special tokens of the tokenizer's own."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[arg-type]


def decode_plain(tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = True) -> str:
    """Text of tokens by themselves, special ones left out unless `special`."""
    found: Any = tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    return str(found)


def find_anchor(tokenizer: transformers.PreTrainedTokenizerBase) -> Anchor:
    """A letter or mark that the tokenizer knows; nothing if it knows none of a few."""
    for text in ("a", ".", "0"):
        ids = encode_plain(tokenizer, text)
        if ids and decode_plain(tokenizer, ids, special=False) == text:
            return Anchor(ids, text)
    return Anchor([], "")


def decode_behind(
    tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int], anchor: Anchor, *, special: bool = False
) -> str:
    """Text of tokens as it stands behind another text, so that a blank at its begin is kept."""
    whole = decode_plain(tokenizer, [*anchor.ids, *ids], special=special)
    return (
        whole.removeprefix(anchor.text)
        if whole.startswith(anchor.text)
        else decode_plain(tokenizer, ids, special=special)
    )


def encode_behind(tokenizer: transformers.PreTrainedTokenizerBase, text: str, anchor: Anchor) -> list[int]:
    """Tokens of a text as it continues another one, without a blank of the tokenizer's own before it."""
    alone = encode_plain(tokenizer, text)
    if decode_behind(tokenizer, alone, anchor, special=True) == text:
        return alone
    for before in ("\n", ".", "a"):
        begun, whole = encode_plain(tokenizer, before), encode_plain(tokenizer, before + text)
        behind = whole[len(begun) :]
        if whole[: len(begun)] == begun and decode_behind(tokenizer, behind, anchor, special=True) == text:
            return behind
    return alone  # the tokenizer changes the text (lower case, say)


def token_text(tokenizer: transformers.PreTrainedTokenizerBase, token: int, anchor: Anchor) -> str:
    r"""A token as the text that it stands for, its blank included, so that no two tokens look alike.

    Part of a character is shown by its bytes (`\xe6\x97`), a number without a token by itself (`<no token 50280>`).
    """
    raw: Any = tokenizer.convert_ids_to_tokens(token)
    if raw is None:
        return f"<no token {token}>"
    text = decode_behind(tokenizer, [token], anchor, special=True)
    if "\ufffd" not in text:
        return text
    if re.fullmatch("<0x[0-9A-F]{2}>", str(raw)):
        return str(raw)
    if all(letter in _BYTES for letter in str(raw)):
        return bytes(_BYTES[letter] for letter in str(raw)).decode("utf-8", "backslashreplace")
    return text


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes (GPT-2's table): printable ones are themselves."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {**{chr(byte): byte for byte in shown}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTES = _byte_letters()
