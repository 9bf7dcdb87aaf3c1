"""Which words of a text carry a concept: by how much a judge's log-odds fall where one is taken out."""

from __future__ import annotations

import re

from trimtab.judges.concepts import Classifier


def word_weights(judge: Classifier, text: str, concept: int = 0) -> list[tuple[str, float]]:
    """A text's words in order, each with what it adds to the judge's log-odds of a concept.

    A word is taken out wherever it stands in the text, in any case and with any punctuation; the log-odds of the whole
    text minus those of what is left are what its places add, all of them the same.

    Args:
        judge: linear in a text's words and letters.
        text: which; blanks at its end are left out.
        concept: number of the concept among the judge's.

    Returns:
        Words with the blanks before them, which make up the text, and nats.
    """
    words = re.findall(r"\s*\S+", text)
    if not words:
        return []
    said = [re.sub(r"\W", "", word).casefold() or word.strip() for word in words]
    distinct = dict.fromkeys(said)
    without = ["".join(word for word, key in zip(words, said, strict=True) if key != gone) for gone in distinct]
    whole, *left = judge.log_odds([text, *without])[:, concept].tolist()
    adds = {key: (whole - one) / said.count(key) for key, one in zip(distinct, left, strict=True)}
    return [(word, adds[key]) for word, key in zip(words, said, strict=True)]
