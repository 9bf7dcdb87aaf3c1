"""Texts as passages of a bounded length, which begin and end where sentences do."""

from __future__ import annotations

import html
import re
from collections import Counter
from typing import Literal

from trimtab.activations import detokenise_wikitext

Cleaning = Literal["none", "wikitext", "html"]

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s+")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Rev|Capt|Col|Gen|Gov|Sen|Lt|Sgt|Jr|Sr|No|vs|Inc|Ltd|Corp|Co|Mt|e\.g|i\.e)|\b[A-Z])\.$"
)
_LOST_ENTITY = re.compile(r"(?<!&)#(\d{2,5});")
_CLITIC = re.compile(r" '(?=(?:s|t|re|ve|ll|d|m)\b)")


def cleaned(text: str, cleaning: Cleaning) -> str:
    """A text without what its source put into it.

    Args:
        text: as its file gives it.
        cleaning: `wikitext` undoes the tokenisation of the WikiText corpora, which other corpora share; `html` undoes
            entities, those that lost their `&` included, tags, and backslashes for line breaks.
    """
    if cleaning == "wikitext":
        return detokenise_wikitext(text)
    if cleaning == "html":
        text = html.unescape(_LOST_ENTITY.sub(r"&#\1;", text))
        text = re.sub(r"<[^<>]+>", " ", text).replace("\\", " ")
        return _CLITIC.sub("'", re.sub(r"[^\S\n]+", " ", text)).strip()
    return text


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences, line breaks and runs of blanks made one blank."""
    text = " ".join(paragraph.split())
    found: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        goes_on = len(match[0].strip()) > 1 and text[match.end() : match.end() + 1].islower()  # "Where?" he asked.
        if not goes_on and not _ABBREVIATION.search(text, start, match.start() + 1):
            found.append(text[start : match.end()].rstrip())
            start = match.end()
    return [*found, text[start:]] if start < len(text) else found


def ended(text: str) -> str:
    """A text up to the end of its last whole sentence; empty if it has none."""
    last = max((m.end() for m in re.finditer(r"[.!?…][\"'”’)\]]*(?=\s|$)", text)), default=0)
    return text[:last].strip()


def passages(text: str, least: int, most: int, dropped: Counter[str]) -> list[str]:
    """A text cut into passages, each as many whole sentences as fit.

    Args:
        text: paragraphs, parted by blank lines, which stay parted so.
        least: fewest characters of a passage.
        most: most characters.
        dropped: counts what is left out, by reason.
    """
    found: list[str] = []
    part = ""

    def end_part() -> None:
        nonlocal part
        if len(part) >= least:
            found.append(part)
        elif part:
            dropped["too short"] += 1
        part = ""

    for paragraph in _PARAGRAPH.split(text):
        joint = "\n\n"
        for sentence in sentences(paragraph):
            if len(part) + len(joint) + len(sentence) > most:
                end_part()
            if len(sentence) > most:
                dropped["a sentence too long"] += 1
                continue
            part = f"{part}{joint}{sentence}" if part else sentence
            joint = " "
    end_part()
    return found
