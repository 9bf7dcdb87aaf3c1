"""Words of generated texts that carry a wish, marked by a rule that anybody can check.

A classifier of words and letters is fitted on the texts that state all wishes, so that it tells them from plain text
and from each other. A word of a generated text is marked if the classifier's log-odds of the wish fall more when it is
taken out than they do for 99 of 100 words of the unsteered texts. So one word in a hundred is marked where nothing was
steered, and what is above that is the steering's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.finding.result import WrittenTexts
from trimtab.judges import ConceptJudge, word_weights
from trimtab.runs.shown import ShownText
from trimtab.stats import Interval, bootstrap_mean

UNSTEERED = "unsteered"
SHARE = 0.99
"""Of the words of unsteered texts that are not marked."""
RULE = (
    "A word is marked, the stronger the more, if a classifier of words and letters, fitted on the texts that state the "
    "wishes, loses more log-odds of the wish when the word is taken out than for 99 of 100 words of the unsteered texts"
)


@dataclass(frozen=True, kw_only=True)
class MarkedText:
    """What one way wrote behind a prompt."""

    prompt: str
    way: str
    words: tuple[str, ...]
    """With the blanks before them."""
    adds: tuple[float, ...]
    """Nats of log-odds that each word adds; 0 where it is not marked."""

    def shown(self, label: str, largest: float) -> ShownText:
        """For the page; the largest is marked most strongly."""
        return ShownText(label=label, tokens=self.words, values=self.adds, largest=largest)


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Texts of some ways with their marked words."""

    texts: tuple[MarkedText, ...]
    threshold: float
    """Nats above which a word is marked."""
    shares: dict[str, Interval]
    """By way, the share of words that are marked, over texts."""

    @property
    def largest(self) -> float:
        """Nats of the word that adds most."""
        return max((value for text in self.texts for value in text.adds), default=0.0)


def mark(
    judge: ConceptJudge, wish: str, written: Sequence[WrittenTexts], ways: Sequence[str], *, seed: int = 0
) -> Marks:
    """Mark the words of texts.

    Args:
        judge: fitted on texts that state wishes.
        wish: which of its concepts.
        written: texts behind prompts, the unsteered ones among them.
        ways: whose texts are marked, beside the unsteered ones.
        seed: of the intervals.
    """
    names, place = (UNSTEERED, *ways), judge.concepts.index(wish)
    weighed = {(i, way): word_weights(judge, one.texts[way], place) for i, one in enumerate(written) for way in names}
    plain = [value for (_, way), words in weighed.items() if way == UNSTEERED for _, value in words]
    threshold = max(0.0, float(np.quantile(plain, SHARE))) if plain else 0.0
    texts = [
        MarkedText(
            prompt=written[i].prompt,
            way=way,
            words=tuple(word for word, _ in words),
            adds=tuple(value if value > threshold else 0.0 for _, value in words),
        )
        for (i, way), words in weighed.items()
    ]

    def share(way: str) -> Interval:
        each = [sum(value > 0 for value in t.adds) / max(len(t.adds), 1) for t in texts if t.way == way]
        return bootstrap_mean(np.array(each), seed=seed)

    return Marks(texts=tuple(texts), threshold=threshold, shares={way: share(way) for way in names})
