"""Words and texts by the rows of a model's embedding table: what words mean before any layer has read them.

Rows are centred and have length 1; a text is the mean over its distinct tokens, each weighted by how rare it is in the
sample text that ships with trimtab, less what all of that text's sentences have in common (as in Arora et al., "A
simple but tough-to-beat baseline for sentence embeddings", 2017). No layer of the model runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from trimtab.activations import read_documents, sample_text
from trimtab.lm import LanguageModel


class TokenEmbeddings:
    """Embeddings without context.

    Args:
        model: whose table, d wide, and whose tokenizer.
    """

    def __init__(self, model: LanguageModel) -> None:
        weight: Any = model.hf.get_input_embeddings().weight  # type: ignore[union-attr]
        table = weight.detach().float().cpu().numpy()
        centred = table - table.mean(axis=0)
        self._rows = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
        self._tokenizer = model.tokenizer
        self._words: dict[str, Float[ndarray, " d"]] = {}
        sentences = [part for one in read_documents([sample_text()]) for part in re.split(r"(?<=[.!?])\s+", one.text)]
        ids = self._ids(sentences)
        counts = np.zeros(len(self._rows))
        for one in ids:
            counts[np.unique(one)] += 1
        self.rarity = np.log((1 + len(ids)) / (1 + counts)) + 1
        self.common = np.mean([self._mean(one) for one in ids], axis=0)

    @property
    def width(self) -> int:
        """d."""
        return self._rows.shape[1]

    def of_texts(self, texts: Sequence[str]) -> Float[ndarray, "N d"]:
        """Embeddings of texts, of length 1; zeros for one without tokens."""
        found = np.zeros((len(texts), self.width))
        for place, ids in enumerate(self._ids(texts)):
            if ids:
                found[place] = self._mean(ids) - self.common
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)

    def of_words(self, words: Sequence[str]) -> Float[ndarray, "N d"]:
        """Embeddings of words as they stand behind a blank: the means of their tokens."""
        new = [word for word in dict.fromkeys(words) if word not in self._words]
        for word, ids in zip(new, self._ids([word if word == "\n" else f" {word}" for word in new]), strict=True):
            self._words[word] = self._rows[ids].mean(axis=0) if ids else np.zeros(self.width)
        return np.array([self._words[word] for word in words]).reshape(-1, self.width)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def _mean(self, ids: Sequence[int]) -> Float[ndarray, " d"]:
        """Mean of a text's tokens, weighted."""
        distinct = np.unique(np.array(ids, int))
        weights = self.rarity[distinct]
        return weights @ self._rows[distinct] / max(weights.sum(), 1e-6)
