"""The part of a command's config that says how text is read, inherited by every command that reads some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import transformers

from trimtab.activations.bad_records import BadRecords, OnBadRecord
from trimtab.activations.cutting import MAX_CHARACTERS
from trimtab.activations.packing import TokenisedCorpus, tokenise
from trimtab.activations.text import Document, Normalisation, read_documents
from trimtab.runs import LEFT_OUT_AT_DEFAULT


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How text is read."""

    text_field: str = "text"
    """Key or column that holds the text."""
    normalise: Normalisation = "none"
    """`wikitext` undoes the tokenisation of the WikiText corpora."""
    document_characters: int = MAX_CHARACTERS
    """Longest document that a plain text file is cut into."""
    bad_records: OnBadRecord = field(default="skip", metadata=LEFT_OUT_AT_DEFAULT)
    """Records that are damaged or hold no text: `skip` leaves out up to one in a hundred and says so, `fail` refuses
    the first."""
    limit_tokens: int | None = None
    """Read no document behind this many tokens."""

    def documents(
        self, text: Sequence[str], limit_documents: int | None = None, bad: BadRecords | None = None
    ) -> Iterator[Document]:
        """Text as documents, as `read_documents` gives them."""
        return read_documents(
            text, text_field=self.text_field, limit=limit_documents, normalise=self.normalise,
            max_characters=self.document_characters, bad_records=bad or self.bad_records,
        )  # fmt: skip

    def corpus(
        self, text: Sequence[str], tokenizer: transformers.PreTrainedTokenizerBase, limit_documents: int | None = None
    ) -> TokenisedCorpus:
        """Text as tokens.

        Args:
            text: files, directories or hub:NAME[[:CONFIG]:SPLIT].
            tokenizer: a fast tokenizer.
            limit_documents: read only this many documents.

        Raises:
            UserError: as `read_documents` and `tokenise` do.
        """
        bad = BadRecords(self.bad_records)
        corpus = tokenise(self.documents(text, limit_documents, bad), tokenizer, limit_tokens=self.limit_tokens)
        bad.check()  # of what was read up to the limit
        return replace(corpus, bad_records=bad.bad)
