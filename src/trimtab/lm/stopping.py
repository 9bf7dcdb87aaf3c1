"""Where a continuation is ended by a stop string, which may be or hold a special token."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.lm.model import LanguageModel


def text_before_stop(model: LanguageModel, ids: Sequence[int], stop: Sequence[str]) -> str | None:
    """The text of a continuation up to the first stop string, special tokens left out; None if it holds none.

    Stop strings are sought in that text; those that hold a special token in the text with special tokens.
    """
    text = model.decode_continuation(ids)
    found = [text[: text.index(one)] for one in stop if one in text]
    marked = [one for one in stop if any(token in one for token in model.special_texts)]
    if marked:
        whole = model.decode_continuation(ids, special=True)
        found += [_plain_text(model, ids, whole, whole.index(one)) for one in marked if one in whole]
    return min(found, key=len, default=None)


def _plain_text(model: LanguageModel, ids: Sequence[int], whole: str, end: int) -> str:
    """The text without special tokens up to a place in that with them."""
    for count in range(len(ids), -1, -1):
        begin = model.decode_continuation(ids[:count], special=True)
        if len(begin) <= end and whole.startswith(begin):
            return model.decode_continuation(ids[:count]) + whole[len(begin) : end]
    raise AssertionError("nothing at all is a begin")
