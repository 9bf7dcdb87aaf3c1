"""Text for an evaluation: packed sequences, which of their tokens are spliced, and sums kept apart by document.

Documents are what intervals resample, so every sum over tokens is kept per document until the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from trimtab.activations import PackedText, TokenisedCorpus
from trimtab.activations.packing import check_rows
from trimtab.activations.row_selection import candidates
from trimtab.activations.sequences import split_corpus
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, TokenBatch
from trimtab.runs import check_least, check_values

TextSplit = Literal["all", "holdout", "train"]


class EvaluationBatch(NamedTuple):
    """Some sequences on the model's device."""

    tokens: TokenBatch
    document: Int[Tensor, "B T"]
    """Index of each token's document; -1 at position 0."""
    candidate: Bool[Tensor, "B T"]
    """Tokens that training would have taken, outlier norms aside."""
    target: Bool[Tensor, "B T"]
    """Places whose next token is in the same document, and so is predicted from it."""


def pack(corpus: TokenisedCorpus, split: TextSplit, holdout: float, context: int, model: LanguageModel) -> PackedText:
    """The documents of a split, packed for a model.

    Raises:
        UserError: the split does not fill one sequence, or the model has no row for one of its tokens.
    """
    check_rows(corpus, model)
    chosen = np.ones(len(corpus.ids), dtype=bool)
    if split != "all":
        held_out = split_corpus(corpus, holdout)
        chosen = held_out if split == "holdout" else ~held_out
    packed = PackedText(corpus, np.flatnonzero(chosen).astype(np.int32), context)
    if len(packed) == 0:
        raise UserError(
            f"text of {packed.n_tokens} tokens (split {split})",
            f"it does not fill one sequence of {context}",
            "give more text or a smaller --context",
        )
    return packed


def batches(
    packed: PackedText,
    batch_size: int,
    special_ids: list[int],
    device: torch.device,
    which: Int[ndarray, " S"] | None = None,
) -> Iterator[EvaluationBatch]:
    """Some sequences, or all of them, in order."""
    which = np.arange(len(packed)) if which is None else which
    for start in range(0, len(which), batch_size):
        sequences = packed.batch(which[start : start + batch_size])
        document = torch.from_numpy(sequences.document.astype(np.int64)).to(device)
        target = torch.zeros_like(document, dtype=torch.bool)
        target[:, :-1] = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
        tokens = TokenBatch.full(torch.from_numpy(sequences.tokens).to(device, torch.long))
        candidate = torch.from_numpy(candidates(sequences, special_ids).keep).to(device)
        yield EvaluationBatch(tokens, document, candidate, target)


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """Which rows of a text an SAE is shown."""

    split: TextSplit = "all"
    """Documents to take: all, or the ones that training with the same --holdout held out (or did not)."""
    holdout: float = 0.05
    """Share of documents that training held out; used by --split holdout and train."""
    context: int = 256
    """Tokens of a sequence, the leading BOS included."""
    batch_size: int = 4
    """Sequences per forward pass."""
    outlier_norm: float = 10.0
    """Rows above this many times the median norm are left as they are, as training leaves them out."""
    drop_special: bool = True
    """Leave special tokens as they are too, chat markup among them."""

    def __post_init__(self) -> None:
        check_values(self, "a share below 1", lambda share: 0 <= share < 1, "holdout")
        check_least(self, 2, "context")
        check_least(self, 1, "batch_size")
        check_values(self, "above 1", lambda norm: norm > 1, "outlier_norm")

    def special_ids(self, model: LanguageModel) -> list[int]:
        """Tokens that are left as they are."""
        return sorted(model.tokenizer.all_special_ids) if self.drop_special else []

    def batches(self, packed: PackedText, model: LanguageModel) -> Iterator[EvaluationBatch]:
        """All sequences, in order."""
        return batches(packed, self.batch_size, self.special_ids(model), model.device)


class DocumentSums:
    """Named sums over tokens, one per document, in float64."""

    def __init__(self, n_documents: int) -> None:
        self.n_documents = n_documents
        self._sums: dict[str, ndarray] = {}

    def add(self, name: str, document: Int[Tensor, " R"], values: Float[Tensor, " R"]) -> None:
        """Add values to the sums of their documents."""
        sums = self._sums.setdefault(name, np.zeros(self.n_documents))
        np.add.at(sums, document.cpu().numpy(), values.double().cpu().numpy())

    def __getitem__(self, name: str) -> Float[ndarray, " documents"]:
        return self._sums[name]
