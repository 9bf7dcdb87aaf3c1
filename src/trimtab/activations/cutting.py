"""Cut long texts into documents where a chapter begins or between paragraphs, as they are read.

A text comes in chunks and is never held whole: what is cut depends on the text alone, not on the chunks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

MAX_CHARACTERS = 8_000
HELD = 1 << 20
"""Characters that are held back at most, to see where the paragraph at their end ends (more if parts are longer)."""

_HEADING = re.compile(
    r"(?:chapter|book|part|volume|act|scene|canto|letter|section)\b[^\n]{0,80}|[IVXLC]{1,7}\.?|\d{1,3}\.?",
    re.IGNORECASE,
)
# From coarse to fine: where a text may be cut, the separator staying with what precedes it.
_CUTS = (re.compile(r"\n[^\S\n]*\n\s*"), re.compile(r"\n"), re.compile(r"[.!?][\"')\]]*\s+"), re.compile(r"\s+"))


def split_text(text: str | Iterable[str], max_characters: int = MAX_CHARACTERS, *, held: int = HELD) -> Iterator[str]:
    """Cut a text into parts of at most `max_characters`, none of them blank.

    A part ends before a chapter heading if it has reached a quarter of the longest length, else between paragraphs;
    only a paragraph that is too long by itself is cut at a line, a sentence, a word, and at last anywhere. Joined, the
    parts give the text back, blanks around the cuts aside.

    Args:
        text: the text, or chunks of it in order.
        max_characters: longest part.
        held: how much of the text is held back at most; the parts do not depend on it.
    """
    assert max_characters > 0
    part = ""
    for unit in _units_of([text] if isinstance(text, str) else text, max_characters, max(held, 4 * max_characters)):
        is_heading = _HEADING.fullmatch(unit.strip()) is not None
        if len(part) + len(unit) > max_characters or (is_heading and len(part) >= max_characters / 4):
            if stripped := part.strip():
                yield stripped
            part = ""
        part += unit
    if stripped := part.strip():
        yield stripped


def _units_of(chunks: Iterable[str], max_characters: int, held: int) -> Iterator[str]:
    """Pieces that parts are made of: paragraphs, and finer ones where a paragraph is too long."""
    text, begun = "", 0
    for chunk in chunks:
        text += chunk
        while len(text) > held:
            end, level = _last_cut(text, max_characters)
            if not end:  # hardly anything but blanks so far
                break
            yield from _units(text[:end], max_characters, level, begun)
            text, begun = text[end:], level
    yield from _units(text, max_characters, 0, begun)


def _last_cut(text: str, max_characters: int) -> tuple[int, int]:
    """Where the last whole piece of a text ends that goes on, and the level of the cut there: the coarsest there is.

    What follows is not blank, so that a separator is whole whatever comes. At a level above 0 the text up to there is
    the begin of one paragraph (line, sentence, word) longer than a part. 0 if it cannot be told yet.
    """
    stop = len(text.rstrip())
    for level, cut in enumerate(_CUTS):
        if level > 1 and stop <= max_characters:
            return 0, 0
        end = max((match.end() for match in cut.finditer(text) if match.end() < stop), default=0)
        if end:
            return end, level
    return (stop - 1) // max_characters * max_characters, len(_CUTS)


def _units(text: str, max_characters: int, level: int, begun: int) -> Iterator[str]:
    """Units of a text that is cut at a level; `begun` is the level at which what it begins with is being cut."""
    if level == len(_CUTS):
        yield from (text[i : i + max_characters] for i in range(0, len(text), max_characters))
        return
    ends = [match.end() for match in _CUTS[level].finditer(text)]
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        piece = text[start:end]
        if len(piece) > max_characters or (piece and start == 0 and begun > level):
            yield from _units(piece, max_characters, level + 1, begun if start == 0 else 0)
        elif piece:
            yield piece
