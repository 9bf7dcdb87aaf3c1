"""Documents → tokens → sequences of one length, without padding.

A corpus is tokenised once into one flat array of 4 bytes a token (a billion tokens are 4 GB); after that, any
sequence of any epoch is a slice, so a harvest or a live stream can start anywhere at no cost. Training documents and
held-out documents are packed apart: no sequence holds both.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import transformers
from jaxtyping import Int32
from numpy import ndarray

from trimtab.activations.text import Document, bytes_of
from trimtab.errors import UserError
from trimtab.lm.model import LanguageModel, no_row
from trimtab.runs.user_files import check_text


@dataclass(frozen=True, kw_only=True)
class TokenisedCorpus:
    """The tokens of a corpus, document after document, each followed by the separator."""

    tokens: Int32[ndarray, " n"]
    starts: ndarray
    """`[documents + 1]` int64: document i is `tokens[starts[i]:starts[i + 1]]`, separator included."""
    ids: tuple[str, ...]
    sources: tuple[str, ...]
    hash: str
    """`corpus_hash` of the documents."""
    first_token: int
    """What every sequence begins with: the tokenizer's BOS token or, where it has none, the separator."""
    separator: int
    bad_records: int = 0
    """How many records of the files were left out because they were damaged."""


class SequenceBatch(NamedTuple):
    """Some packed sequences; position 0 of each is the corpus's `first_token` and belongs to no document."""

    tokens: Int32[ndarray, "B T"]
    document: Int32[ndarray, "B T"]
    """Index into `TokenisedCorpus.ids`; -1 at position 0."""
    position: Int32[ndarray, "B T"]
    """Place of the token in its document; -1 at position 0."""


@dataclass(frozen=True)
class PackedText:
    """Sequences of `context` tokens cut from some documents of a corpus, each behind the corpus's `first_token`."""

    corpus: TokenisedCorpus
    documents: Int32[ndarray, " m"]
    """The documents packed, by index, in order."""
    context: int

    @cached_property
    def _ends(self) -> ndarray:
        return np.cumsum(np.diff(self.corpus.starts)[self.documents])

    def __len__(self) -> int:
        """Number of whole sequences. The tokens behind the last one, fewer than a sequence, are left out."""
        return self.n_tokens // (self.context - 1)

    @property
    def n_tokens(self) -> int:
        """Tokens of the documents, separators included."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def batch(self, sequences: Sequence[int] | ndarray) -> SequenceBatch:
        """The sequences of the given indices, in that order."""
        body = self.context - 1
        place = np.asarray(sequences, dtype=np.int64)[:, None] * body + np.arange(body)  # [B, T-1] in the packed stream
        which = np.searchsorted(self._ends, place, side="right")
        document = self.documents[which]
        lengths = np.diff(self.corpus.starts)[document]
        position = place - (self._ends[which] - lengths)
        tokens = self.corpus.tokens[self.corpus.starts[document] + position]
        return SequenceBatch(_behind(self.corpus.first_token, tokens), _behind(-1, document), _behind(-1, position))


def tokenise(
    documents: Iterable[Document], tokenizer: transformers.PreTrainedTokenizerBase, *, limit_tokens: int | None = None
) -> TokenisedCorpus:
    """Tokenise documents in batches.

    Template markup in a text (`<|im_start|>user`) becomes the special tokens that it names; a BOS token at the begin of
    a document is left out, as sequences begin with it. No other special tokens are added, save the separator behind
    each document: `<|endoftext|>` where the vocabulary has it, else the EOS token.

    Args:
        documents: read once, one batch at a time; texts are not kept.
        tokenizer: a fast tokenizer.
        limit_tokens: stop behind the document that reaches this many tokens.

    Raises:
        UserError: there is no text, a document holds a byte or half a character that is no text, or the tokenizer knows
            no token that could separate documents.
    """
    separator, first_token = _separator(tokenizer), tokenizer.bos_token_id
    digest, ids, sources = hashlib.sha256(), [], []
    pieces: list[ndarray] = []
    total = begun = 0
    for document, tokens in _encoded(documents, tokenizer):
        digest.update(bytes_of(document))
        if tokens and tokens[0] == first_token:
            begun, tokens = begun + 1, tokens[1:]
        ids.append(document.id)
        sources.append(document.source)
        pieces.append(np.asarray([*tokens, separator], dtype=np.int32))
        total += len(pieces[-1])
        if limit_tokens is not None and total >= limit_tokens:
            break
    if begun:
        said = f"{begun:,} of {len(ids):,} documents begin with {tokenizer.bos_token}, which is left out there"
        print(f"trimtab: note: {said}, as each sequence begins with it anyway", file=sys.stderr, flush=True)
    if not pieces:
        raise UserError("the text", "there is no text in it", "give at least one document")
    return TokenisedCorpus(
        tokens=np.concatenate(pieces),
        starts=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        ids=tuple(ids),
        sources=tuple(sources),
        hash=digest.hexdigest(),
        first_token=separator if first_token is None else int(first_token),  # type: ignore[arg-type]
        separator=separator,
    )


def check_rows(corpus: TokenisedCorpus, model: LanguageModel) -> None:
    """Raise a `UserError` if a token of a corpus has no row in the model's embedding, as where a tokenizer got tokens
    that the model did not."""
    if int(corpus.tokens.max(initial=corpus.first_token)) >= model.vocab_size:
        place = int((corpus.tokens >= model.vocab_size).argmax())
        document = corpus.ids[int(np.searchsorted(corpus.starts, place, side="right")) - 1]
        raise no_row(model, max(int(corpus.tokens[place]), corpus.first_token), f"document {document!r}")


def _separator(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    end_of_text = tokenizer.get_vocab().get("<|endoftext|>")
    for token in (end_of_text, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if isinstance(token, int):
            return token
    raise UserError(
        "the tokenizer",
        "it has no end-of-text, EOS or BOS token to put between documents",
        "choose another model",
    )


def _encoded(
    documents: Iterable[Document], tokenizer: transformers.PreTrainedTokenizerBase
) -> Iterator[tuple[Document, list[int]]]:
    for batch in _batches(documents):
        encoded: Any = tokenizer([d.text for d in batch], add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip(batch, encoded, strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Up to 256 documents, of up to a few million characters, so that long ones do not fill the memory."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        check_text(document.text, f"document {document.id!r}")
        batch.append(document)
        characters += len(document.text)
        if len(batch) == 256 or characters > 1 << 22:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _behind(first: int, body: ndarray) -> Int32[ndarray, "B T"]:
    out = np.empty((body.shape[0], body.shape[1] + 1), dtype=np.int32)
    out[:, 0], out[:, 1:] = first, body
    return out
