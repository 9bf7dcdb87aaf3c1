"""The part of a command's config that says how text is read, inherited by every command that reads some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import transformers

from trimtab.activations.packing import TokenisedCorpus, tokenise
from trimtab.activations.text import MAX_CHARACTERS, Normalisation, read_documents


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How text is read."""

    text_field: str = "text"
    """Key or column that holds the text."""
    normalise: Normalisation = "none"
    """`wikitext` undoes the tokenisation of the WikiText corpora."""
    document_characters: int = MAX_CHARACTERS
    """Longest document that a plain text file is cut into."""
    limit_tokens: int | None = None
    """Read no document behind this many tokens."""

    def corpus(
        self, text: Sequence[str], tokenizer: transformers.PreTrainedTokenizerBase, limit_documents: int | None = None
    ) -> TokenisedCorpus:
        """Text as tokens.

        Args:
            text: files, directories or hub:NAME[:SPLIT].
            tokenizer: a fast tokenizer.
            limit_documents: read only this many documents.

        Raises:
            UserError: as `read_documents` and `tokenise` do.
        """
        documents = read_documents(
            text, text_field=self.text_field, limit=limit_documents, normalise=self.normalise,
            max_characters=self.document_characters,
        )  # fmt: skip
        return tokenise(documents, tokenizer, limit_tokens=self.limit_tokens)
