"""Scores of steered texts without a chat model: whether they have a concept, answer the instruction, are language."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from trimtab.interpreting.judge import Meaning, Passage, Rating, ToRate
from trimtab.judges import Unjudged, find_gibberish
from trimtab.judges.gibberish import FUNCTION_WORDS

SAME_SUBJECT = 0.2
"""Overlap of two answers to one instruction, from which a text counts as related to it. Half of the pairs of answers to
one instruction in AxBench's texts have 0.26 and more, one in twenty pairs of answers to two instructions 0.07."""
_ASKING = frozenset(["what", "which", "who", "whom", "whose", "when", "where", "why", "how", "did", "does"])
_CONTENT = re.compile(r"[^\W\d_]{3,}|\d+")
_STEM = 6
"""Letters by which words are compared, so that `democracy` meets `democratic`."""

Probabilities = Callable[[Meaning, Sequence[Passage]], Float[ndarray, " N"] | Unjudged]
"""How likely each of some passages has what a meaning says."""


def rate_texts(texts: Sequence[ToRate], probabilities: Probabilities) -> list[Rating | Unjudged]:
    """Scores of texts.

    The concept's score is twice by how much likelier the steered text has it than the unsteered one, and 0 where it is
    less likely, so that what the model writes anyway earns nothing. Fluency is 2, or 0 for gibberish by the rules,
    which see loops and letter salad; whether a text is as likely as ordinary text only its model can say.

    Args:
        texts: N of them.
        probabilities: asked once for each meaning.
    """
    found: list[Rating | Unjudged] = [Unjudged("")] * len(texts)
    places: dict[int, list[int]] = {}
    for place, one in enumerate(texts):
        places.setdefault(id(one.meaning), []).append(place)
    for rows in places.values():
        written = [texts[i].text for i in rows] + [texts[i].unsteered for i in rows]
        p = probabilities(texts[rows[0]].meaning, [as_passage(text) for text in written])
        for number, place in enumerate(rows):
            found[place] = (
                p
                if isinstance(p, Unjudged)
                else Rating(
                    concept=2 * max(0.0, float(p[number] - p[len(rows) + number])),
                    instruction=2 * relatedness(texts[place]),
                    fluency=0.0 if find_gibberish(texts[place].text) else 2.0,
                )
            )
    return found


def as_passage(text: str) -> Passage:
    """A text as one passage."""
    return Passage(tokens=tuple(re.findall(r"\s*\S+|\s+$", text)))


def relatedness(one: ToRate) -> float:
    """How far a text takes up an instruction, from 0 to 1: the words of the instruction as often as the unsteered
    answer does, or else as many of the unsteered answer's own words as another answer would. It does not say whether
    the answer is right."""
    asked, usual, said = _content(one.instruction), _content(one.unsteered), _content(one.text)
    least = 1 / max(1, len(asked))
    taken_up = _share(asked & said, asked) / max(least, _share(asked & usual, asked))
    shared = len(said & usual) / max(1.0, float(np.sqrt(len(said) * len(usual))))
    return min(1.0, max(taken_up, shared / SAME_SUBJECT))


def _content(text: str) -> frozenset[str]:
    """What its words are about."""
    words = _CONTENT.findall(text.lower())
    return frozenset(word[:_STEM] for word in words if word not in FUNCTION_WORDS and word not in _ASKING)


def _share(part: frozenset[str], whole: frozenset[str]) -> float:
    return len(part) / max(1, len(whole))
