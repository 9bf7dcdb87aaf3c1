"""Small detectors of a feature, each fitted on passages that have it and passages that lack it.

Two families that share nothing but the split into words, so that what one of them finds is not built into the other:
embeddings (`EmbeddedText`, `EmbeddedWords`), and surface forms (`CountedWords`, `WordsAndLetters`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from trimtab.interpreting.judge import Passage
from trimtab.interpreting.judges.embeddings import TokenEmbeddings
from trimtab.interpreting.judges.passage_words import largest_activation, words_of
from trimtab.judges.concepts import TfidfTerms

C = 10.0
"""Inverse weight of the penalty of the logistic regressions."""
DOUBT = 2.0
"""Occurrences without the feature that a word is credited with beforehand, so that few occurrences say little."""
SILENT, LOUD = 0.02, 0.25
"""Shares of the largest activation: below the first a feature does not fire on a word, above the second it does; in
between nothing is learned from the word."""


class Detector(Protocol):
    """Gives passages scores, higher where the feature is likelier."""

    def scores(self, passages: Sequence[Passage]) -> Float[ndarray, " N"]:
        """One for each passage, on any scale."""
        ...


class Fitting(Protocol):
    """Fits a detector."""

    def __call__(self, has: Sequence[Passage], lacks: Sequence[Passage]) -> Detector:
        """The detector that some passages lead to."""
        ...


class CountedWords:
    """How often the feature fires where a word stands; a passage scores as its likeliest word.

    Where passages come with activations, occurrences count by how strongly the feature fires on them; where they do
    not, a word counts once in each passage that has it.
    """

    def __init__(self, has: Sequence[Passage], lacks: Sequence[Passage]) -> None:
        largest = largest_activation((*has, *lacks))
        fired: dict[str, float] = {}
        seen: dict[str, float] = {}
        for passages, yes in ((has, 1.0), (lacks, 0.0)):
            for passage in passages:
                words, fires = words_of(passage, largest)
                if fires is None:
                    words = list(dict.fromkeys(words))
                    fires = np.full(len(words), yes)
                for word, weight in zip(words, fires.tolist(), strict=True):
                    fired[word] = fired.get(word, 0.0) + weight
                    seen[word] = seen.get(word, 0.0) + 1
        self.rates = {word: fired[word] / (seen[word] + DOUBT) for word in seen}

    @property
    def strongest(self) -> list[str]:
        """The words on which it fires most often."""
        return [word for word in sorted(self.rates, key=lambda word: -self.rates[word]) if self.rates[word] > 0]

    def scores(self, passages: Sequence[Passage]) -> Float[ndarray, " N"]:
        """The likelihood of each passage's likeliest word."""
        return np.array([max((self.rates.get(w, 0.0) for w in words_of(p).words), default=0.0) for p in passages])


class WordsAndLetters:
    """TF-IDF of words and of letter sequences, and a logistic regression."""

    def __init__(self, has: Sequence[Passage], lacks: Sequence[Passage]) -> None:
        texts = [passage.text for passage in (*has, *lacks)]
        terms = (
            TfidfTerms.of(texts, "word", 1, 2, 30_000, 2 if len(texts) > 100 else 1),
            TfidfTerms.of(texts, "char_wb", 3, 5, 50_000, 3 if len(texts) > 100 else 2),
        )
        self._described = [one.vectoriser() for one in terms]
        self._model = _logistic(self._describe((*has, *lacks)), len(has))

    def _describe(self, passages: Sequence[Passage]) -> Any:
        from scipy.sparse import hstack

        texts = [passage.text for passage in passages]
        return hstack([one.transform(texts) for one in self._described]).tocsr()

    def scores(self, passages: Sequence[Passage]) -> Float[ndarray, " N"]:
        """Log-odds."""
        return self._model.decision_function(self._describe(passages))


class EmbeddedText:
    """A logistic regression on a passage's embedding."""

    def __init__(self, embeddings: TokenEmbeddings, has: Sequence[Passage], lacks: Sequence[Passage]) -> None:
        self._embeddings = embeddings
        self._model = _logistic(self._embed((*has, *lacks)), len(has))

    def _embed(self, passages: Sequence[Passage]) -> Float[ndarray, "N d"]:
        return SCALE * self._embeddings.of_texts([passage.text for passage in passages])

    def scores(self, passages: Sequence[Passage]) -> Float[ndarray, " N"]:
        """Log-odds."""
        return self._model.decision_function(self._embed(passages))


SCALE = 3.0
"""Length that embeddings are given, by which the penalty weighs less."""


class EmbeddedWords:
    """A logistic regression on words' embeddings: on which the feature fires. A passage scores as its likeliest word.

    It finds features of single words that a passage's mean embedding misses, and knows words that it has not seen by
    those near them. Of passages without activations nothing is learned, and all score the same then.
    """

    def __init__(self, embeddings: TokenEmbeddings, has: Sequence[Passage], lacks: Sequence[Passage]) -> None:
        self._embeddings = embeddings
        largest = largest_activation((*has, *lacks))
        fires: list[str] = []
        silent: list[str] = []
        for words, strength in (words_of(passage, largest) for passage in (*has, *lacks)):
            if strength is None:
                continue
            fires += [word for word, s in zip(words, strength, strict=True) if s >= LOUD]
            silent += [word for word, s in zip(words, strength, strict=True) if s <= SILENT]
        self._model = (
            _logistic(SCALE * embeddings.of_words([*fires, *silent]), len(fires)) if fires and silent else None
        )

    def scores(self, passages: Sequence[Passage]) -> Float[ndarray, " N"]:
        """The log-odds of each passage's likeliest word."""
        if self._model is None:
            return np.zeros(len(passages))
        words = [words_of(passage).words or [""] for passage in passages]
        odds = self._model.decision_function(SCALE * self._embeddings.of_words([word for one in words for word in one]))
        return np.maximum.reduceat(odds, np.cumsum([0, *map(len, words[:-1])])) if words else np.zeros(0)


def _logistic(x: Any, having: int) -> Any:
    """A fitted classifier of rows, the first `having` of which have the feature; both kinds weigh the same."""
    from sklearn.linear_model import LogisticRegression

    model: Any = LogisticRegression(C=C, class_weight="balanced", solver="liblinear", random_state=0)
    return model.fit(x, np.arange(x.shape[0]) < having)
